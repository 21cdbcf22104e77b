"""The machine model: buses, devices, run state, guest policy."""
