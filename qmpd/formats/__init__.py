"""On-disk formats as values: bytes in, values or bytes out; no file, no asyncio."""
