"""A pool that is drawn, not downloaded: for trying tailwise out and for its tests."""
