"""Containers of samples: their index, fingerprint, byte ranges, and the decoder of their images."""
