"""Tests of what infc tells of programs and artifacts."""
