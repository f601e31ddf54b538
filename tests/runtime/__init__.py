"""Tests of the runtime: scheduling, sampling, text, the engine."""
