"""Traces a transformers model into portable prefill and decode MLIR with `llmir` ops."""
