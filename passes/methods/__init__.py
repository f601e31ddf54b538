"""Calibrated methods of quantization: passes that choose codes by what a model computes on text."""
