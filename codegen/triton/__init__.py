"""The Triton backend: launches as data, over kernels compiled ahead of time for one GPU."""
