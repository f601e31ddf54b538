"""What this machine has of all that infc may use, each as one finding."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

from ..ir.errors import InfcError
from ..ir.target import check_platform, resolve_target

_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. `needed`: without it no artifact runs here."""

    subject: str
    fine: bool
    detail: str
    needed: bool = False


def examine() -> list[Finding]:
    """Looks at the platform, the processor, the compiler, libraries, memory and backends."""
    compiler = _compiler()
    compiling = [_library("torch"), _library("transformers")]
    return [
        _platform(),
        _instruction_set(),
        _processors(),
        _memory(),
        _huge_pages(),
        compiler,
        *compiling,
        *(_library(name) for name in ("numpy", "tokenizers", "safetensors")),
        _disk(),
        *_backends(compiler, compiling[0]),
    ]


def _platform() -> Finding:
    detail = f"{platform.system()} on {platform.machine()}, Python {platform.python_version()}"
    try:
        check_platform()
    except InfcError as error:
        return Finding("platform", False, str(error), needed=True)
    return Finding("platform", True, detail, needed=True)


def _instruction_set() -> Finding:
    try:
        name = resolve_target("native").name
    except InfcError as error:
        return Finding("instruction set", False, str(error), needed=True)
    return Finding("instruction set", True, name, needed=True)


def _processors() -> Finding:
    usable, all_of_them = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    return Finding("processors", True, f"{usable} of {all_of_them} may be used")


def _memory() -> Finding:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Finding("memory", True, f"{free / 2**30:.1f} GiB free of {pages / 2**30:.1f} GiB")


def _huge_pages() -> Finding:
    try:
        text = _HUGE_PAGES.read_text().strip()
    except OSError:
        return Finding("huge pages", False, "this kernel has no transparent huge pages")
    chosen = text.partition("[")[2].partition("]")[0]
    return Finding("huge pages", chosen in ("always", "madvise"), f"transparent, set to {chosen}")


def _compiler() -> Finding:
    from ..codegen.cpp.toolchain import find_toolchain

    try:
        found = find_toolchain()
    except InfcError as error:
        return Finding("C++ compiler", False, str(error))
    return Finding("C++ compiler", True, f"{found.path}: {found.version}")


def _library(name: str) -> Finding:
    try:
        return Finding(name, True, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        compiling = name in ("torch", "transformers")
        use = "needed by `infc compile`: pip install 'infc[compile]'" if compiling else "needed"
        return Finding(name, False, use, needed=not compiling)


def _disk() -> Finding:
    from .cache import cache_directory

    place = cache_directory()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    return Finding("cache", os.access(place, os.W_OK), f"{place}, {free / 1e9:.1f} GB free")


def _backends(compiler: Finding, torch: Finding) -> list[Finding]:
    compiles = "compiles and runs" if compiler.fine else "runs artifacts, and compiles none"
    return [
        Finding("backend cpp", True, compiles),
        Finding("backend reference", torch.fine, "runs" if torch.fine else "needs torch"),
    ]
