"""LUKS volumes over block edges: open, unlock, create."""
