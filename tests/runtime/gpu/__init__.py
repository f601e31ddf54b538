"""Tests of the executor for GPUs, over drivers that need none."""
