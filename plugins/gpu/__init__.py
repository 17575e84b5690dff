"""Implementations for GPUs, as templates of MLIR: kernels, and forms that the compiler makes one dispatch of."""
