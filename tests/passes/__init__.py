"""Tests of the passes, the matcher, the pipeline and verification."""
