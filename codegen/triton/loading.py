"""Kernels as functions of Triton: from their files, or from the text of a generated one."""

from __future__ import annotations

import ast
import importlib
import linecache
from collections.abc import Mapping
from typing import Any, Final

KERNELS: Final = f"{__package__}.kernels"


def load_function(code: Mapping[str, Any]) -> Any:
    """The kernel of a `KernelCode.plain`.

    One for dependent launches waits first of all. An interpreted one need not: there, each launch
    ends before the next begins.
    """
    if code["source"] is None:
        module = importlib.import_module(f"{KERNELS}.{code['module']}")
        function = getattr(module, code["function"])
    else:
        function = _generated(code["function"], code["source"])
    return _waiting(function) if code["dependent"] and hasattr(function, "src") else function


def _waiting(function: Any) -> Any:
    """The kernel with a wait for the launch before it ahead of all that it does.

    The launch behind it may then begin, and will wait in turn: its blocks can only come when all
    blocks of this one are there, and what this one has waited for has ended. The text is changed
    within a line, so that machine code has the lines of the source.
    """
    import triton

    lines = function.src.splitlines(keepends=True)
    (tree,) = ast.parse(function.src).body
    assert isinstance(tree, ast.FunctionDef)
    first = tree.body[0]
    if ast.get_docstring(tree, clean=False) is not None:
        place, column, text = first.end_lineno, first.end_col_offset, f"; {_WAIT}"
    else:
        assert not hasattr(first, "body"), "a simple statement can follow on the line"
        place, column, text = first.lineno, first.col_offset, f"{_WAIT}; "
    assert place is not None and column is not None
    line = lines[place - 1].encode()
    lines[place - 1] = (line[:column] + text.encode() + line[column:]).decode()
    changed = triton.jit(function.fn)
    changed._unsafe_update_src("".join(lines))
    return changed


_WAIT: Final = "tl.extra.cuda.gdc_wait(); tl.extra.cuda.gdc_launch_dependents()"


def _generated(name: str, source: str) -> Any:
    """What `loops.py` wrote; Triton reads the text of a function again, by the name of its file."""
    numbers = importlib.import_module(f"{KERNELS}.numbers")
    helpers = {key: value for key, value in vars(numbers).items() if not key.startswith("_")}
    file = f"infc/loops/{name}.py"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    space: dict[str, Any] = {**helpers, "__name__": file}
    exec(compile(source, file, "exec"), space)
    return space[name]
