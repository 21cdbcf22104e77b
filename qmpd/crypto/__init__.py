"""Sector ciphers, IV generators, anti-forensic splitting, key derivation: pure functions on buffers."""
