"""Requests: their state in the engine, and the outputs that they produce."""
