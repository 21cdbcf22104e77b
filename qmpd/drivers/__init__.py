"""Block drivers, one file each."""
