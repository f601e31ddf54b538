"""Engines of TensorRT-RTX, which builds them without a driver."""
