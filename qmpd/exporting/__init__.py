"""What all exports share: registry and life cycle."""
