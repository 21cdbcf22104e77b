"""The programs qmpd and qmpd-storage-daemon: options, sockets, start and stop."""
