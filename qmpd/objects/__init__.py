"""User-creatable object types, one file each."""
