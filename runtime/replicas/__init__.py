"""Engines as processes of their own, behind one front."""
