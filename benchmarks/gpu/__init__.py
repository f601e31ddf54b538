"""Measurements on NVIDIA GPUs: `run.py` makes all of them."""
