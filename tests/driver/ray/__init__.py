"""Tests of infc on Ray."""
