"""Sampling: parameters, logits adjustments, and how a token is taken from a row of logits."""
