"""The pair table: its columns, the rules of a usable pair, reading, writing, statistics, and the order of visits."""
