"""Whole paths: from a checkpoint to tokens."""
