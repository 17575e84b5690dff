"""The passes, one to a file; the pipeline lists them in order."""
