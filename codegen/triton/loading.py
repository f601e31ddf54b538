"""Kernels as functions of Triton: from their files, or from the text of a generated one."""

from __future__ import annotations

import importlib
import linecache
from collections.abc import Mapping
from typing import Any, Final

KERNELS: Final = f"{__package__}.kernels"


def load_function(code: Mapping[str, Any]) -> Any:
    """The kernel of a `KernelCode.plain`."""
    if code["source"] is None:
        module = importlib.import_module(f"{KERNELS}.{code['module']}")
        return getattr(module, code["function"])
    return _generated(code["function"], code["source"])


def _generated(name: str, source: str) -> Any:
    """What `loops.py` wrote; Triton reads the text of a function again, by the name of its file."""
    numbers = importlib.import_module(f"{KERNELS}.numbers")
    helpers = {key: value for key, value in vars(numbers).items() if not key.startswith("_")}
    file = f"infc/loops/{name}.py"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    space: dict[str, Any] = {**helpers, "__name__": file}
    exec(compile(source, file, "exec"), space)
    return space[name]
