"""Reads checkpoints and writes packed, memory-mapped parameter archives."""
