"""The readers, one file for every kind of checkpoint."""
