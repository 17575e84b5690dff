"""Portable definitions of the `llmir` ops, as MLIR templates that every target compiles."""
