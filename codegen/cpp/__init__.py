"""The cpp backend: one generated C++ function for a step, over header-only kernels."""
