"""Samples in the user's files: containers, and the decoder of their images."""
