"""HTTP's side: bytes in, bytes out. It knows no framework."""
