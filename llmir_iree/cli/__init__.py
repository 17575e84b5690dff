"""The command lines: each parses its words into one call of the library."""
