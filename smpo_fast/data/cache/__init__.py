"""The cache of encoded pairs: its format, its writer and reader, and the program that prepares it."""
