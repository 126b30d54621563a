"""From any source to a pair table: containers of records, what their columns mean, and the pairs that follow."""
