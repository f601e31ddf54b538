"""Tests of calibrated quantization: the feedback, and the pass over a model."""
