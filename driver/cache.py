"""The cache of artifacts: found by what they were made of, bounded, oldest use goes first."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs

from ..ir.artifact import Artifact, ArtifactWriter, open_artifact
from ..ir.digests import digest_file
from ..ir.errors import ArtifactError, UsageError
from ..ir.files import is_ours, write_whole
from ..ir.leftovers import partial_prefix, sweep
from ..ir.sizes import parse_size
from ..ir.user_cache import cache_directory, make_private, read_private, refusal, write_private
from .workplaces import WORKPLACES

DEFAULT_LIMIT_BYTES = 20 * 10**9
LIMIT_VARIABLE = "INFC_CACHE_LIMIT"
_ROOMS = ("ir", "frontend", "passes", "codegen", "driver", "runtime")  # whatever shapes an artifact
_LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "jinja2", "gguf")
# What a checkpoint directory often holds beside the model: other formats, and prose.
_FILE = "model.gguf"
_IGNORED = frozenset({".md", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".png"})


def cache_limit_bytes() -> int:
    """The limit of the cache: `$INFC_CACHE_LIMIT`, else what `set_cache_limit` kept, else 20 GB.

    Written such as `5GB`; 0 keeps no artifact. UsageError where it is no size.
    """
    where, text = LIMIT_VARIABLE, os.environ.get(LIMIT_VARIABLE)
    if text is None:
        where = str(_limit_file())
        try:
            text = _limit_file().read_text()
        except OSError:
            return DEFAULT_LIMIT_BYTES
    return _size_or_zero(text, where)


def set_cache_limit(text: str) -> int:
    """Keeps a limit for this user, as bytes; UsageError where it is no size, or cannot be kept."""
    size = _size_or_zero(text, "the limit")
    place = _limit_file()
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        write_whole(place, f"{text.strip()}\n")
    except OSError as error:
        raise UsageError(
            f"cannot be written: {error.strerror}", where=str(place), hint=f"set ${LIMIT_VARIABLE}"
        ) from None
    return size


def _limit_file() -> Path:
    return platformdirs.user_config_path("infc") / "cache-limit"


def _size_or_zero(text: str, where: str) -> int:
    try:
        return parse_size(text.strip())
    except ValueError:
        raise UsageError(f"not a size: {text.strip()!r}", where=where, hint="such as 5GB") from None


def cache_key(parts: Mapping[str, Any], checkpoint: Path) -> str:
    """The name of what these inputs give: options, checkpoint, our sources and the libraries."""
    everything = {
        **parts,
        "checkpoint": _digest_checkpoint(checkpoint),
        "sources": _digest_sources(),
        "libraries": {name: _version(name) for name in _LIBRARIES},
    }
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()


def checkpoint_identity(path: Path) -> str:
    """SHA-256, in hex, of a checkpoint's weights: what makes it this one and not another.

    That of a GGUF file is of all of the file, whatever its name.
    """
    digests = _digest_checkpoint(path)
    weights = {name: digests[name] for name in digests if name.endswith((".safetensors", _FILE))}
    return hashlib.sha256(json.dumps(weights, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class CacheUse:
    """How much the cache holds."""

    directory: Path
    num_artifacts: int
    size_bytes: int
    limit_bytes: int


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """One artifact in the cache: its key, what it is of, and when it was last used (seconds)."""

    key: str
    model: str
    backend: str
    target: str
    options: str
    size_bytes: int
    last_use: float


def _options(recipe: Mapping[str, Any]) -> str:
    """What builds of one model differ in: "bfloat16, int8, kv int8"."""
    quantization, cached = recipe.get("quantization", "none"), recipe.get("kv_cache")
    scheme = quantization.get("scheme", "none") if isinstance(quantization, dict) else quantization
    cache = cached.get("dtype", "auto") if isinstance(cached, dict) else "auto"
    shown = [f"dtype {recipe.get('dtype', 'auto')}"]
    shown += [f"weights {scheme}"] if scheme != "none" else []
    shown += [f"kv {cache}"] if cache != "auto" else []
    return ", ".join(shown)


class ArtifactCache:
    """Artifacts by key. Whatever goes wrong in it costs a compilation and nothing else."""

    def __init__(self, directory: Path | None = None, limit_bytes: int | None = None) -> None:
        self.directory = directory or cache_directory()
        self.limit_bytes = cache_limit_bytes() if limit_bytes is None else limit_bytes
        self._artifacts = self.directory / "artifacts"

    def find(self, key: str, on_remark: Callable[[str], None] | None = None) -> Artifact | None:
        """The artifact of that key with every digest right, or None; a damaged one is dropped.

        One that others could have written is left alone, and `on_remark` hears why.
        """
        path = self._artifacts / key
        if not path.is_dir():
            return None
        if reason := self._refusal(path):
            if on_remark is not None:
                on_remark(f"the cache is not used: {reason}")
            return None
        try:
            found = open_artifact(path)
        except ArtifactError:
            _remove(path)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # the time of the last use
        return found

    def add(self, key: str, artifact: Artifact) -> str | None:
        """Keeps a copy, then evicts down to the limit; the reason where it did not, else None."""
        size = sum(digest.bytes for digest in artifact.manifest.files.values())
        if size > self.limit_bytes:
            return f"it is larger than the cache may be ({LIMIT_VARIABLE})"
        try:
            make_private(self.directory)
            make_private(self._artifacts)
            with ArtifactWriter(self._artifacts / key) as writer:
                writer.commit_copy(artifact)
        except OSError as error:
            return f"cannot write {error.filename}: {error.strerror}"
        except ArtifactError as error:
            return str(error)
        self.evict()
        return None

    def place(self, key: str) -> Path:
        """The path of the artifact of a key, whether it exists or not."""
        return self._artifacts / key

    def use(self) -> CacheUse:
        """What the cache holds now."""
        entries = list(self._entries())
        size = sum(_size_bytes(path) for path in entries)
        return CacheUse(self.directory, len(entries), size, self.limit_bytes)

    def entries(self) -> list[CacheEntry]:
        """What is kept, the last used first; what cannot be read is shown as damaged."""
        found = []
        for path in self._entries():
            model, backend, target, options = "damaged", "", "", ""
            with contextlib.suppress(ArtifactError):
                manifest = open_artifact(path, "none").manifest
                model = str(manifest.recipe.get("model", manifest.model.architecture))
                backend, target = manifest.backend, manifest.target.name
                options = _options(manifest.recipe)
            size, last_use = _size_bytes(path), _mtime(path)
            found.append(CacheEntry(path.name, model, backend, target, options, size, last_use))
        return sorted(found, key=lambda entry: -entry.last_use)

    def prune(self) -> CacheUse:
        """Removes what the limit does not allow, and what killed processes left; what went."""
        before = self.use()
        self.evict()
        after = self.use()
        return CacheUse(
            self.directory,
            before.num_artifacts - after.num_artifacts,
            before.size_bytes - after.size_bytes,
            self.limit_bytes,
        )

    def clear(self) -> CacheUse:
        """Removes everything but what others still write; returns what was there.

        One artifact at a time, and inside of the cache: what a kill leaves is swept later.
        """
        before = self.use()
        for path in self._entries():
            _remove(path)
        self.sweep()
        with contextlib.suppress(OSError):
            for path in self.directory.iterdir():
                if path.name not in (self._artifacts.name, *WORKPLACES):
                    shutil.rmtree(path, ignore_errors=True)
        for name in (self._artifacts.name, *WORKPLACES):
            with contextlib.suppress(OSError):  # where another process has just begun to write
                (self.directory / name).rmdir()
        with contextlib.suppress(OSError):
            self.directory.rmdir()
        return before

    def _refusal(self, path: Path) -> str | None:
        """Why an entry is not used; None where nobody else can have written it."""
        for place in (self.directory, self._artifacts):
            if not is_ours(place.stat()):
                return f"{place} belongs to another user, or others can write to it"
        return refusal(path)

    def _entries(self) -> Iterator[Path]:
        with contextlib.suppress(OSError):
            yield from (p for p in self._artifacts.iterdir() if not p.name.startswith("."))

    def evict(self, spare: str | None = None) -> None:
        """Removes artifacts, the longest unused first, and what killed runs left behind.

        `spare` is the key of an artifact that is about to be used, which is never removed.
        """
        entries = sorted(self._entries(), key=lambda path: (path.name == spare, _mtime(path)))
        sizes = {path: _size_bytes(path) for path in entries}
        total = sum(sizes.values())
        for path in entries:
            if total <= self.limit_bytes or path.name == spare:
                break
            _remove(path)
            total -= sizes[path]
        self.sweep()

    def sweep(self) -> int:
        """Removes what killed processes left in the cache; the number of things removed."""
        names = ("artifacts", "stamps", "checkpoints", "machines", "kernels", *WORKPLACES)
        return sum(sweep(self.directory / name) for name in names)


def _digest_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """Name -> digest of each file that a model may be made of; unchanged ones are remembered."""
    place = hashlib.sha256(os.fsencode(checkpoint.resolve())).hexdigest()[:32]
    memory = cache_directory() / "checkpoints" / f"{place}.json"
    known = _read_memory(memory)
    result, remembered = {}, {}
    for name, path in _model_files(checkpoint):
        state = path.stat()
        stamp = [state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns]
        entry = known.get(name)
        if not isinstance(entry, dict) or entry.get("stamp") != stamp:
            digest = digest_file(path)
            entry = {"stamp": stamp, "digest": digest.sha256 or list(digest.chunks or ())}
        result[name] = entry["digest"]
        if time.time_ns() - max(stamp[2:]) > 10**9:  # one that is being written may change again
            remembered[name] = entry
    _write_memory(memory, remembered)
    return result


def _model_files(checkpoint: Path) -> list[tuple[str, Path]]:
    """The files that a model may be made of, by their names in it; a file is all of a model."""
    if not checkpoint.is_dir():
        return [(_FILE, checkpoint)]
    return sorted(
        (path.relative_to(checkpoint).as_posix(), path)
        for path in checkpoint.rglob("*")
        if path.is_file()
        and path.suffix.lower() not in _IGNORED
        and not any(part.startswith(".") for part in path.relative_to(checkpoint).parts)
    )


def _read_memory(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(read_private(path))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _write_memory(path: Path, data: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):
        write_private(path, json.dumps(data))


def _digest_sources() -> str:
    """One digest over the compiler's own sources: an edited pass must never find old artifacts."""
    digest = hashlib.sha256()
    package = Path(__file__).resolve().parents[1]
    for room in _ROOMS:
        for path in sorted((package / room).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(str(path.relative_to(package)).encode() + b"\0")
                digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def _size_bytes(path: Path) -> int:
    total = 0
    for place, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(place, name)).st_size
    return total


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _remove(path: Path) -> None:
    """Moves out of the way first: another process must never see half of it under its name."""
    aside = path.with_name(f"{partial_prefix(path)}removed{os.getpid()}")
    try:
        path.rename(aside)
    except OSError:
        aside = path
    shutil.rmtree(aside, ignore_errors=True)
