"""Handlers of QMP commands, one module per file of qapi/."""
