"""qmpd: QEMU's monitor protocol and block layer as a Python daemon, made for encrypted disks."""
