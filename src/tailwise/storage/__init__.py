"""Bytes of files, local or remote: the one place that talks to fsspec."""
