"""The fault campaign: every program killed, starved of disk and memory, and fed damaged files (docs/reliability.md)."""
