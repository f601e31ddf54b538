"""Builds outside the tree: setuptools leaves `build/lib` there, and packs what it finds in it."""

import tempfile

from setuptools import setup

with tempfile.TemporaryDirectory(prefix="infc-build-") as place:
    setup(options={"build": {"build_base": place}})
