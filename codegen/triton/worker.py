"""Compiles kernels, as a process of its own: a job a line comes in, a result a line goes out.

Knows of infc only the kernels: it needs neither torch nor a GPU.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Final

# Before triton is imported: it decides there whether kernels are interpreted.
os.environ["TRITON_INTERPRET"] = "0"

import triton
import triton.language
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from .boxes import Box, box_of, is_tile
from .loading import KERNELS, load_function

_RENAMED: set[str] = set()


def main() -> None:
    """Jobs from standard input until it ends. What others print does not mix with the results."""
    results = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    rename_files(triton.language, "triton")
    for line in sys.stdin:
        job = json.loads(line)
        try:
            result = compile_kernel(job)
        except Exception as error:  # whatever Triton raises is told to whoever asked
            result = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(result), file=results, flush=True)


def compile_kernel(job: dict[str, Any]) -> dict[str, Any]:
    """Compile one kernel for `job["capability"]`, and write its two files at `job["place"]`."""
    code = job["code"]
    function = load_function(code)
    rename_files(importlib.import_module(KERNELS), "infc/kernels")
    parameters = dict(code["parameters"])
    names = [name for name in function.arg_names if name not in code["constants"]]
    if names != list(parameters):
        raise TypeError(f"{code['function']} takes {names}, given {list(parameters)}")
    signature = {name: parameters.get(name, "constexpr") for name in function.arg_names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(function.arg_names)
        if name in code["aligned"]
    }
    # Products and sums are rounded one by one, as the meanings of ops say.
    options = {
        "num_warps": code["warps"],
        "num_stages": code["stages"],
        "enable_fp_fusion": False,
    }
    source = ASTSource(function, signature, code["constants"], aligned)
    target = GPUTarget("cuda", job["capability"], 32)
    kernel = triton.compile(source, target=target, options=options)
    _check_boxes([kind for _, kind in code["parameters"] if is_tile(kind)], kernel)
    # Launches pass 0 for both.
    if kernel.metadata.global_scratch_size or kernel.metadata.profile_scratch_size:
        raise ValueError(f"{kernel.metadata.name} wants scratch memory")
    place = Path(job["place"])
    ptx, cubin = kernel.asm["ptx"], kernel.asm["cubin"]
    place.with_suffix(".ptx").write_text(ptx, encoding="utf-8")
    place.with_suffix(".cubin").write_bytes(cubin)
    return {
        "entry": kernel.metadata.name,
        "threads": _threads(ptx),
        "shared_bytes": kernel.metadata.shared,
        **_resources(cubin),
    }


def _check_boxes(kinds: Sequence[str], kernel: Any) -> None:
    """Whether the kernel takes the descriptors that launches make for it."""
    found = [
        Box(tuple(one["block_size"]), _SWIZZLES[one["swizzle"]])
        for one in kernel.metadata.tensordesc_meta or ()
    ]
    if found != [box_of(kind) for kind in kinds]:
        raise ValueError(f"{kernel.metadata.name} copies {found} of {list(kinds)}")


_SWIZZLES: Final = (0, 32, 64, 128)
"""Bytes, by Triton's numbers."""


def rename_files(package: ModuleType, name: str) -> None:
    """Let functions of a package say that they come from files below `name`, wherever it lies.

    Machine code then has the lines of its source, and is the same whoever compiled it.
    """
    found = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    modules = {package.__name__, *(one.name for one in found)}
    for module in sorted((modules & sys.modules.keys()) - _RENAMED):
        _RENAMED.add(module)
        for value in vars(sys.modules[module]).values():
            if isinstance(value, JITFunction) and value.__module__ == module:
                file = f"{name}/{module.rpartition('.')[2]}.py"
                value.fn.__code__ = value.fn.__code__.replace(co_filename=file)


def _threads(ptx: str) -> int:
    """Threads of a block, which need not be 32 for each warp that was asked for."""
    found = re.search(r"\.reqntid (\d+)", ptx)
    if found is None:
        raise ValueError("the PTX does not say how many threads a block has")
    return int(found[1])


def _resources(cubin: bytes) -> dict[str, int]:
    """What a thread uses: registers, and bytes of its stack, where registers are spilled to."""
    import triton.backends.nvidia as nvidia

    (folder,) = nvidia.__path__
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(Path(folder, "bin/cuobjdump")), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return {
        "registers": int(used["REG"]),
        "spilled_bytes": int(used["STACK"]) + int(used["LOCAL"]),
    }


if __name__ == "__main__":
    main()
