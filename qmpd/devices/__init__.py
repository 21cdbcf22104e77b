"""Device models, one file each."""
