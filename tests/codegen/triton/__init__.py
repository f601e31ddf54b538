"""The Triton backend: its launches, and its kernels by Triton's interpreter."""
