"""Kernels in Triton. Each is one text for the compiler, the interpreter and the reader."""
