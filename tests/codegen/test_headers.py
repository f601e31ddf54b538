"""What each compilation reads: the kernels take only headers that cost little time."""

import subprocess
from pathlib import Path

from infc.codegen.cpp.backend import ABI, KERNELS
from infc.codegen.cpp.toolchain import find_toolchain
from infc.runtime.executors import cpp_abi

COSTLY = {
    "algorithm",
    "chrono",
    "cmath",
    "condition_variable",
    "functional",
    "iostream",
    "map",
    "memory",
    "mutex",
    "stdexcept",
    "string",
    "thread",
    "vector",
}
"""Each takes between 0.07 and 0.3 s, in every `infc compile`."""


def test_the_executor_speaks_the_version_of_the_headers() -> None:
    assert cpp_abi.ABI == ABI


def test_no_costly_header_is_read(tmp_path: Path) -> None:
    source = tmp_path / "step.cpp"
    source.write_text('#include "entry.hpp"\n')
    command = [find_toolchain().path, "-std=c++17", f"-I{KERNELS}", "-M", str(source)]
    rule = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    headers = {Path(word).name for word in rule.split() if "/include/" in word}
    assert "atomic" in headers
    assert not headers & COSTLY
