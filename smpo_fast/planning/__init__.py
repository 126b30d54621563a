"""What a run needs before it is started: memory, time, disk, and what this machine can do.

Imports everything below it; nothing but ``cli`` imports it.
"""
