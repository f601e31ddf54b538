"""Tests of the pages under docs/: examples run, tables are those of the code."""
