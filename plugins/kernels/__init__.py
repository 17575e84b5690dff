"""Kernels in C, compiled to freestanding objects that iree-compile links into a dispatch."""
