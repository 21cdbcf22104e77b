"""Job types, one file each."""
