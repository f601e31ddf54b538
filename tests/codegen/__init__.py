"""Tests of the codegen room."""
