"""Tests of the ground: types, ops, programs, artifacts and targets."""
