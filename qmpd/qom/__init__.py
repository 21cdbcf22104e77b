"""The QOM tree: objects, their properties and paths."""
