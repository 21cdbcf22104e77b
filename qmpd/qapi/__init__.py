"""The QAPI schema: read, checked, compiled to visitors, introspected."""
