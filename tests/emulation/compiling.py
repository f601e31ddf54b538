"""Compiles the kernels of `kernels.py`: a process that takes and answers lines of JSON.

Each capability needs a process of its own. Triton 3.6 keeps what it found out for the first one:
after sm_90, it converts floats of eight bits for sm_89 by instructions that only sm_90 has.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any


class Compiler:
    """One process, which keeps what it compiles in a folder."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        environment = {**environment, "TRITON_CACHE_DIR": str(folder)}
        environment.pop("TRITON_INTERPRET", None)
        self._process = subprocess.Popen(
            # Modules beside this script, such as `wave`, must not hide others.
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """What the process answers; it prints errors itself."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, f"{question['name']} cannot be compiled"
        found: dict[str, Any] = json.loads(answer)
        return found

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


@cache
def _kernels() -> ModuleType:
    spec = spec_from_file_location("kernels", Path(__file__).with_name("kernels.py"))
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _compile(
    name: str,
    capability: int,
    types: dict[str, str],
    constants: dict[str, Any],
    options: dict[str, Any],
) -> dict[str, Any]:
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(_kernels(), name)
    signature = {one: types.get(one, "constexpr") for one in function.arg_names}
    aligned = [
        place
        for place, (one, kind) in enumerate(signature.items())
        if kind.startswith("*") or (one in ("K", "N") and kind == "i32")
    ]
    values = {
        one: getattr(tl, value) if isinstance(value, str) else value
        for one, value in constants.items()
    }
    compiled = triton.compile(
        ASTSource(
            function,
            signature,
            values,
            {(place,): [["tt.divisibility", 16]] for place in aligned},
        ),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": 4, "num_stages": 3, **options},
    )
    return {"source": compiled.asm["ptx"], "shared_bytes": compiled.metadata.shared}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(_compile(**json.loads(line))), flush=True)
