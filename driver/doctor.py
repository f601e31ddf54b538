"""What this machine has of all that infc may use, each as one finding."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..codegen.registry import get_backend
from ..ir.backends import BackendInfo, known_backends
from ..ir.errors import InfcError
from ..ir.extras import COMPILE
from ..ir.machine import (
    available_cpus,
    available_memory,
    cpu_quota,
    huge_page_setting,
    memory_limit,
)
from ..ir.nvidia import describe_gpu
from ..ir.plugins import load_plugins
from ..ir.sizes import format_size
from ..ir.targets import check_platform, resolve_target
from .huge_pages import anonymous_in_huge_pages, file_in_huge_pages


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. `needed`: without it no artifact runs here."""

    subject: str
    fine: bool
    detail: str
    needed: bool = False
    lacking: str = "missing"
    """The word for it where it is not fine."""


def examine() -> list[Finding]:
    """Looks at the platform, the processor, memory, libraries, and what each backend takes."""
    absent = COMPILE.missing()
    compiling = [_compiling(name, name not in absent) for name in COMPILE.libraries]
    plugins = list(_plugins())
    looks = [_look_at(info, compiling) for info in known_backends()]
    return [
        _infc(),
        _platform(),
        _instruction_set(),
        *_processors(),
        *_memory(),
        *_huge_pages(),
        _gpu(),
        *(need for look in looks for need in look.needs),
        *compiling,
        *(_library(name) for name in _requirements()),
        _disk(),
        *plugins,
        *(look.backend for look in looks),
    ]


def _infc() -> Finding:
    from .. import __version__

    return Finding("infc", True, f"{__version__} in {Path(__file__).resolve().parents[1]}")


def _platform() -> Finding:
    libc = " ".join(platform.libc_ver()).strip() or "an unknown C library"
    detail = (
        f"{platform.system()} {platform.release()} on {platform.machine()},"
        f" Python {platform.python_version()}, {libc}"
    )
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


def _processors() -> Iterator[Finding]:
    usable, all_of_them, team = len(os.sched_getaffinity(0)), os.cpu_count() or 1, available_cpus()
    quota = cpu_quota()
    allowed = "no quota" if quota is None else f"a quota of {quota:g} from the control group"
    yield Finding("processors", True, f"{usable} of {all_of_them} can be used, {allowed}")
    yield Finding("threads", True, f"{team} by default (a thread pool of its own, no OpenMP)")


def _memory() -> Iterator[Finding]:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = memory_limit()
    allowed = "no limit" if limit is None else f"at most {format_size(limit)} by the control group"
    free = available_memory()
    yield Finding(
        "memory", free > 0, f"{format_size(free)} free of {format_size(pages)}, {allowed}"
    )


def _huge_pages() -> Iterator[Finding]:
    setting = huge_page_setting()
    if setting is None:
        yield Finding("huge pages", False, "this kernel has no transparent huge pages")
        return
    anonymous = anonymous_in_huge_pages()
    measured = "available" if anonymous else "not available"
    yield Finding("huge pages", anonymous, f"transparent, set to {setting}: {measured}")
    place = _existing(Path.cwd())
    try:
        mapped = file_in_huge_pages(place)
    except OSError as error:
        yield Finding("huge pages, files", False, f"not measured in {place}: {error.strerror}")
        return
    measured = "available for mapped files" if mapped else "not available for mapped files"
    yield Finding("huge pages, files", mapped, f"{measured} in {place}")


def _gpu() -> Finding:
    """The GPU that artifacts for GPUs run on, or what there is not of GPU, driver and bindings."""
    try:
        return Finding("NVIDIA GPU", True, describe_gpu())
    except InfcError as error:
        return Finding("NVIDIA GPU", False, str(error), lacking="none")


def _requirements() -> list[str]:
    """What infc declares that it cannot do without, by name; nothing where it is not installed."""
    try:
        texts = importlib.metadata.requires("infc") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    names = (re.match(r"[\w.-]+", text) for text in texts if "extra ==" not in text)
    return sorted(match[0] for match in names if match)


def _library(name: str) -> Finding:
    """A distribution that infc declares."""
    version = _version(name)
    return Finding(name, version is not None, version or "needed", needed=True)


def _compiling(name: str, fine: bool) -> Finding:
    """A module that compiling imports; its distribution may have another name."""
    if not fine:
        return Finding(name, False, f"needed by `infc compile`: {COMPILE.install}")
    return Finding(name, True, _version(name) or "installed")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _disk() -> Finding:
    from ..ir.user_cache import cache_directory

    place = cache_directory()
    present = _existing(place)
    free = shutil.disk_usage(present).free
    return Finding("cache", os.access(present, os.W_OK), f"{place}, {free / 1e9:.1f} GB free")


def _existing(place: Path) -> Path:
    while not place.exists():
        place = place.parent
    return place


def _plugins() -> Iterator[Finding]:
    """Loads the plug-ins, whose backends are then known; a finding for one that does not load."""
    try:
        load_plugins()
    except InfcError as error:
        yield Finding("plug-ins", False, str(error))


@dataclass(frozen=True, slots=True)
class _Look:
    """What a backend takes to compile, and what it does here."""

    needs: tuple[Finding, ...]
    backend: Finding


def _look_at(info: BackendInfo, compiling: list[Finding]) -> _Look:
    subject = f"backend {info.name}"
    try:
        backend = get_backend(info.name)
        needs = tuple(Finding(one.subject, one.fine, one.detail) for one in backend.needs())
        reason = backend.unable_here()
        missing = [] if info.extra is None else info.extra.missing()
    except InfcError as error:
        return _Look((), Finding(subject, False, str(error)))
    except Exception as error:  # of a plug-in, which must not hide the other findings
        return _Look((), Finding(subject, False, f"{type(error).__name__}: {error}"))
    if reason is None and missing:
        reason = f"needs {', '.join(missing)}"
    if reason is not None:
        compiles = all(found.fine for found in (*needs, *compiling)) and not missing
        # For a GPU, artifacts are often compiled where there is none.
        said = f"compiles artifacts, and cannot run them: {reason}" if compiles else reason
        return _Look(needs, Finding(subject, False, said))
    does = "works, but is slow" if backend.interprets else "compiles and runs artifacts"
    if lacking := [found.subject for found in (*needs, *compiling) if not found.fine]:
        does = f"runs artifacts; compiling needs {', '.join(lacking)}"
    return _Look(needs, Finding(subject, True, does))
