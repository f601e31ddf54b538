"""NVIDIA's tools, where they are installed: compute-sanitizer, and Nsight Compute."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from .setting import Results, Setting
from .steps import Workload

_FOLDERS: Final = ("/usr/local/cuda/bin", "/opt/nvidia/nsight-compute", "/usr/local/bin")
_SANITIZERS: Final = {"memcheck": (), "racecheck": ("--eager",)}
"""Races are looked for without graphs, which the tool sees as one."""
_WRONG: Final = 9
SECTIONS: Final = ("SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "WarpStateStats")


def find_tool(name: str) -> str | None:
    """Where a tool is: on the path, or where NVIDIA's packages put it."""
    if (found := shutil.which(name)) is not None:
        return found
    for folder in map(Path, _FOLDERS):
        for place in (folder / name, *sorted(folder.glob(f"*/{name}"), reverse=True)):
            if place.is_file():
                return str(place)
    return None


def check_memory(setting: Setting, artifacts: Mapping[str, Path]) -> Results:
    """What compute-sanitizer finds in a prompt and a few decode steps of small models."""
    tool = find_tool("compute-sanitizer")
    if tool is None:
        return {"skipped": "compute-sanitizer is not installed"}
    cases: Results = {}
    unfinished: list[str] = []
    for kind, options in _SANITIZERS.items():
        for name, artifact in artifacts.items():
            if setting.left < 5 or not artifact.exists():
                continue
            command = (tool, "--tool", kind, "--error-exitcode", str(_WRONG), "--print-limit", "20")
            try:
                child = setting.run_child(
                    "child", str(artifact), "--prompt", "40", *options, before=command
                )
            except subprocess.TimeoutExpired:
                unfinished.append(f"{kind} {name}")
                continue
            log = setting.folder / f"{kind}-{name}.log"
            log.write_text(child.stdout, encoding="utf-8")
            said = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", child.stdout)
            told = said[-1] if said else child.stdout[-200:].strip()
            cases[f"{kind} {name}"] = {"fine": child.returncode == 0, "error": told}
    wrong = [name for name, one in cases.items() if not one["fine"]]
    return {"cases": cases, "wrong": wrong, "unfinished": unfinished}


def worst_kernels(lines: Mapping[str, Mapping[str, float]], count: int = 2) -> list[str]:
    """The names of the kernels that lose most time against the roofline in a decode step."""
    lost = {name: line["µs"] - line["roofline µs"] for name, line in lines.items()}
    names = [name.rpartition(" ")[2] for name in sorted(lost, key=lambda name: -lost[name])]
    return list(dict.fromkeys(names))[:count]


def profile_kernels(
    setting: Setting, workload: Workload, lines: Mapping[str, Mapping[str, float]]
) -> Results:
    """What Nsight Compute says of the two worst kernels of a decode step; clocks stay as they are.

    All of it is in `ncu.log`.
    """
    tool = find_tool("ncu")
    if tool is None:
        return {"skipped": "ncu is not installed"}
    names = worst_kernels(lines)
    if not names:
        return {"skipped": "no launches were timed"}
    # The first launches only warm up.
    command = [tool, "--clock-control", "none", "--launch-skip", "4", "--launch-count", "4"]
    command += ["--kernel-name", f"regex:^({'|'.join(map(re.escape, names))})"]
    command += [word for section in SECTIONS for word in ("--section", section)]
    batch, context = workload.decodes[0]
    place = str(workload.artifact(setting).path)
    shape = f"{batch}x{context}"
    child = setting.run_child("child", place, "--eager", "--shape", shape, before=command)
    (setting.folder / "ncu.log").write_text(child.stdout, encoding="utf-8")
    if "ERR_NVGPUCTRPERM" in child.stdout:
        return {"skipped": "ncu may not read the GPU's counters here"}
    if child.returncode:
        raise RuntimeError(child.stdout[-400:])
    return {"counters": dict(_counters(child.stdout))}


_METRICS: Final = (
    "Duration",
    "Memory Throughput",
    "DRAM Throughput",
    "Compute (SM) Throughput",
    "Achieved Occupancy",
)


def _counters(text: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Of each kernel, the figures that are looked at first."""
    heads = list(re.finditer(r"^ {2}(\w[\w$]*).*\(\d+, \d+, \d+\)x\(\d+, \d+, \d+\)", text, re.M))
    for head, end in zip(heads, [*(one.start() for one in heads[1:]), len(text)], strict=True):
        part, figures = text[head.end() : end], {}
        for name in _METRICS:
            line = re.search(rf"^\s*{re.escape(name)}\s+(\S+)\s+([\d.,]+)", part, re.M)
            if line is not None:
                figures[name] = f"{line[2]} {line[1]}"
        yield head[1], figures
