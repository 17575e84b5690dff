"""Turns a Llama-family checkpoint into compiled IREE modules, runs them, and explains where the time goes."""
