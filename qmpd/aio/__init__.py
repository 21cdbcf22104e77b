"""Descriptors, threads and clocks: the only code that touches them, with the owners of data sockets."""
