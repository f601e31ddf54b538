"""An artifact on disk: written whole or not at all, opened only if every byte is accounted for."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shlex
import shutil
import stat
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Literal, get_args

from filelock import FileLock, Timeout

from .digests import StampFile, check_digests, digest_file
from .directory import OpenDirectory
from .errors import ArtifactError, ProgramError, UsageError
from .files import exchange, is_ours, protect, share_file, sync, umask, uninterrupted
from .leftovers import lock_path, partial_prefix, sweep
from .manifest import FORMAT, MANIFEST_NAME, FileDigest, Manifest, parse_manifest
from .manifest_values import check_values
from .sizes import format_size
from .user_cache import cache_directory

Verification = Literal["stamp", "full", "none"]
"""`full` reads every file; `stamp` leaves out those whose stamp says they were; `none` trusts."""

_MAX_MANIFEST_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Artifact:
    """An opened artifact. Its weights have been verified when `verify_weights().result()` returns.

    The directory is opened only once. If another artifact replaces it, the files of the two are
    not mixed.
    """

    path: Path
    manifest: Manifest
    identity: str
    """SHA-256 of the text of the manifest, in hex. Equal artifacts have the same identity."""
    directory: OpenDirectory = field(repr=False, compare=False)
    _weights: _WeightsCheck = field(repr=False, compare=False)

    def __repr__(self) -> str:
        # The manifest has thousands of entries, and a notebook prints whatever a cell ends with.
        model = self.manifest.model.architecture
        return f"Artifact({str(self.path)!r}, model={model!r}, identity='{self.identity[:12]}…')"

    @property
    def weights_path(self) -> Path:
        """The file of weights of the main program."""
        return self.path / self.manifest.main.weights.file

    @property
    def entry_path(self) -> Path:
        """What runs the main program, such as a shared library."""
        return self.path / self.manifest.main.entry.file

    def read_text(self, name: str) -> str:
        """Reads one of the files as text. Raises ArtifactError if it cannot be read."""
        try:
            return self.directory.read(name).decode("utf-8")
        except OSError as error:
            raise self.unreadable(name, error) from None
        except UnicodeDecodeError:
            raise ArtifactError("is not UTF-8", where=str(self.path / name)) from None

    def open_file(self, name: str) -> int:
        """Opens one of the files; the caller closes the descriptor. Raises ArtifactError."""
        try:
            return self.directory.open(name)
        except OSError as error:
            raise self.unreadable(name, error) from None

    def weights_are_ours(self) -> bool:
        """Whether no other user can write to the weight files."""
        return all(map(self._is_ours, self.manifest.weight_files()))

    def _is_ours(self, name: str) -> bool:
        try:
            return is_ours(self.directory.state(name))
        except OSError as error:
            raise self.unreadable(name, error) from None

    def check_in_place(self, name: str) -> None:
        """Raises ArtifactError if a file has been replaced since it was checked."""
        try:
            now, opened = os.stat(self.path / name), self.directory.state(name)
            if not os.path.samestat(now, opened):
                raise FileNotFoundError
        except OSError as error:
            raise self.unreadable(name, error) from None

    def unreadable(self, name: str, error: OSError) -> ArtifactError:
        """The error for a file that exists but could not be read."""
        if isinstance(error, FileNotFoundError):
            return ArtifactError(
                "the artifact was replaced while it was being opened",
                where=str(self.path),
                hint="open it again",
            )
        return ArtifactError(f"cannot be read: {error.strerror}", where=str(self.path / name))

    def verify_weights(self) -> Future[None]:
        """Starts to verify the weights in the background; returns the same future on each call.

        Its `result()` raises ArtifactError if a byte differs. No token may be returned before.
        """
        return self._weights.begin()


def check_verification(verify: object) -> None:
    """Raises UsageError for what is no `verify`."""
    if verify not in get_args(Verification):
        raise UsageError(f"verify is {verify!r}", hint="use stamp, full or none")


def open_artifact(
    path: str | os.PathLike[str],
    verify: Verification = "stamp",
    *,
    weights: Literal["now", "later"] = "now",
) -> Artifact:
    """Opens an artifact after checking its manifest, the names in it, and the digests of its files.

    `weights="later"` leaves the files of weights to `Artifact.verify_weights()`.
    Raises ArtifactError where it is missing, damaged, made by a newer infc, or holds anything
    that its manifest does not list, UsageError for another `verify`.
    """
    check_verification(verify)
    root = Path(path)
    directory = _open_directory(root)
    text = _read_manifest(directory)
    manifest = parse_manifest(text, where=str(root / MANIFEST_NAME))
    identity = hashlib.sha256(text.encode()).hexdigest()
    _check_names(directory, manifest)
    late = manifest.weight_files()
    names = [name for name in manifest.files if name not in late]
    stamps = StampFile(_stamp_path(root), identity)
    _check_files(directory, manifest, names, stamps, verify)
    later = _WeightsCheck(directory, manifest, stamps, verify)
    if weights == "now":
        later.begin().result()
    return Artifact(root, manifest, identity, directory, later)


class _WeightsCheck:
    """Checks the files of weights once, on a thread of its own."""

    def __init__(
        self, directory: OpenDirectory, manifest: Manifest, stamps: StampFile, verify: Verification
    ) -> None:
        self._directory, self._manifest = directory, manifest
        self._stamps, self._verify = stamps, verify
        self._lock = threading.Lock()
        self._future: Future[None] | None = None

    def begin(self) -> Future[None]:
        with self._lock:
            if self._future is None:
                self._future = Future()
                run = threading.Thread(target=self._run, args=(self._future,), daemon=True)
                run.start()
            return self._future

    def _run(self, future: Future[None]) -> None:
        try:
            names = list(self._manifest.weight_files())
            _check_files(self._directory, self._manifest, names, self._stamps, self._verify)
            future.set_result(None)
        except BaseException as error:
            future.set_exception(error)


def _check_files(
    directory: OpenDirectory,
    manifest: Manifest,
    names: list[str],
    stamps: StampFile,
    verify: Verification,
) -> None:
    if verify == "none":
        return
    try:
        if verify == "stamp":
            names = [name for name in names if not stamps.is_fresh(directory, name)]
        keep = stamps.watch(directory, names)
    except OSError as error:  # removed since its names were checked
        where = str(directory.path)
        raise ArtifactError(f"cannot be read: {error.strerror}", where=where) from None
    if names:
        check_digests(directory, {name: manifest.files[name] for name in names})
        keep()


def _open_directory(root: Path) -> OpenDirectory:
    try:
        return OpenDirectory(root)
    except (FileNotFoundError, NotADirectoryError):
        problem = "is not a directory" if root.exists() else "does not exist"
        raise ArtifactError(
            f"the artifact {problem}", where=str(root), hint="`infc compile` makes one"
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise ArtifactError(f"cannot be read: {reason}", where=str(root)) from None


def _read_manifest(directory: OpenDirectory) -> str:
    root, path = directory.path, directory.path / MANIFEST_NAME
    try:
        state = directory.state(MANIFEST_NAME)
        if problem := _no_file(state):
            raise _refused(root, MANIFEST_NAME, problem)
        if state.st_size > _MAX_MANIFEST_BYTES:
            size = format_size(state.st_size)
            raise ArtifactError(f"far too large for a manifest: {size}", where=str(path))
        return directory.read(MANIFEST_NAME).decode("utf-8")
    except FileNotFoundError:
        raise ArtifactError(
            f"no {MANIFEST_NAME} here: not an infc artifact",
            where=str(root),
            hint="`infc compile` makes one",
        ) from None
    except UnicodeDecodeError:
        raise ArtifactError("the manifest is damaged: not UTF-8", where=str(path)) from None
    except OSError as error:
        raise ArtifactError(f"cannot be read: {error.strerror}", where=str(path)) from None


def _no_file(state: os.stat_result) -> str:
    """What it is instead of a file; empty for a file."""
    if stat.S_ISREG(state.st_mode):
        return ""
    return "a symbolic link" if stat.S_ISLNK(state.st_mode) else "neither a file nor a directory"


def _refused(root: Path, name: str, problem: str) -> ArtifactError:
    hint = None
    if "link" in problem:
        hint = f"`cp -rL {shlex.quote(str(root))} COPY` makes an artifact of the files themselves"
    return ArtifactError(f"{name!r} is {problem}", where=str(root), hint=hint)


def _check_names(directory: OpenDirectory, manifest: Manifest) -> None:
    """Every listed name is a plain relative one and there; nothing else is; sizes agree."""
    root = directory.path
    for name in manifest.files:
        if not _is_plain_name(name):
            raise ArtifactError(f"the manifest lists the unsafe name {name!r}", where=str(root))
    found = dict(_walk(directory))
    found.pop(MANIFEST_NAME, None)
    if missing := sorted(set(manifest.files) - set(found)):
        raise ArtifactError(f"the file {missing[0]!r} is missing", where=str(root))
    if extra := sorted(set(found) - set(manifest.files)):
        raise ArtifactError(
            f"the file {extra[0]!r} is not listed in {MANIFEST_NAME}",
            where=str(root),
            hint="remove it, or compile the model again",
        )
    for name, digest in manifest.files.items():
        if found[name] != digest.bytes:
            raise ArtifactError(
                f"has {found[name]} bytes instead of {digest.bytes}",
                where=str(root / name),
                hint="the artifact is damaged: compile it again",
            )
    used = [one.entry.file for one in manifest.programs.values()]
    used += manifest.weight_files()
    if manifest.tokenizer is not None:
        files = manifest.tokenizer
        used += [n for n in (files.file, files.chat_template, files.tool_template) if n is not None]
    if absent := [name for name in used if name not in manifest.files]:
        raise ArtifactError(
            f"the manifest uses {absent[0]!r} and does not list it", where=str(root)
        )


def _is_plain_name(name: str) -> bool:
    parts = name.split("/")
    plain = all(part not in ("", ".", "..") and "\0" not in part for part in parts)
    return plain and not PurePosixPath(name).is_absolute() and name != MANIFEST_NAME


def _walk(directory: OpenDirectory) -> Iterator[tuple[str, int]]:
    """The files in it as (name, bytes); a link or a device is an error."""
    try:
        for name, state in directory.walk():
            if problem := _no_file(state):
                raise _refused(directory.path, name, problem)
            yield name, state.st_size
    except OSError as error:
        where = str(directory.path)
        raise ArtifactError(f"cannot be read: {error.strerror}", where=where) from None


def _stamp_path(root: Path) -> Path:
    place = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()
    return cache_directory() / "stamps" / f"{place[:32]}.json"


class ArtifactWriter:
    """Writes an artifact: enter, fill `path`, `commit(manifest)`; whole or absent whatever happens.

    Holds a lock beside the destination, and a directory under a temporary name there. An older
    artifact at the destination stays until the new one takes its place; anything else that
    stands there is never touched. Raises ArtifactError where it cannot write.
    """

    def __init__(self, destination: str | os.PathLike[str]) -> None:
        self.destination = Path(os.path.abspath(destination))
        self.path = self.destination  # until entered
        self._weights: dict[str, tuple[tuple[int, ...], FileDigest]] = {}
        # A moment's patience: another writer may be sweeping up after one that was killed.
        self._lock = FileLock(lock_path(self.destination), timeout=1)

    def __enter__(self) -> ArtifactWriter:
        is_made = False
        try:
            with self._explained(), uninterrupted():
                self._check_replaceable()
                try:
                    self.destination.parent.mkdir(parents=True, exist_ok=True)
                except FileExistsError as error:  # what mkdir says of a file in its way
                    raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from error
                sweep(self.destination.parent)
                self._acquire()
                try:
                    prefix = partial_prefix(self.destination)
                    self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=self.destination.parent))
                    is_made = True
                    self.path.chmod(0o777 & ~umask())  # mkdtemp makes it private
                except BaseException:
                    self._release()
                    raise
        except BaseException:
            if is_made:  # an interrupt that came meanwhile is raised behind it
                self._remove()
            raise
        return self

    def _remove(self) -> None:
        with uninterrupted():
            shutil.rmtree(self.path, ignore_errors=True)  # gone already after a commit
            self._release()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._remove()
        if isinstance(error, OSError) and error.errno in _WRITE_ERRORS:
            raise self._cannot_write(error) from error

    def commit(self, manifest: Manifest) -> Manifest:
        """Lists and digests every file, writes the manifest, and moves all to the destination."""
        with self._explained():
            complete = self._write_manifest(manifest)
            self._move([*complete.files, MANIFEST_NAME])
        return complete

    def preview(self, manifest: Manifest) -> Artifact:
        """Opens what is there so far, where it is written, to be run before it is committed."""
        with self._explained():
            self._write_manifest(manifest)
            return open_artifact(self.path, "none")

    def _write_manifest(self, manifest: Manifest) -> Manifest:
        directory = OpenDirectory(self.path)
        names = sorted(name for name, _ in _walk(directory) if name != MANIFEST_NAME)
        weights = manifest.weight_files()
        files = {
            name: self._weights_digest(name) if name in weights else digest_file(self.path / name)
            for name in names
        }
        complete = replace(manifest, files=files)
        try:
            check_values(complete)
        except ValueError as error:  # before it replaces an artifact that can be opened
            raise ProgramError(f"no artifact can have this: {error}") from None
        (self.path / MANIFEST_NAME).write_text(complete.to_text(), encoding="utf-8")
        _check_names(directory, complete)
        return complete

    def _weights_digest(self, name: str) -> FileDigest:
        """The digest of a large file, taken once for as long as nobody writes to it."""
        found = (self.path / name).stat()
        stamp = (found.st_ino, found.st_size, found.st_mtime_ns)
        if name not in self._weights or self._weights[name][0] != stamp:
            self._weights[name] = stamp, digest_file(self.path / name)
        return self._weights[name][1]

    def commit_copy(self, artifact: Artifact) -> None:
        """Moves a copy of an artifact, whose files were checked, to the destination.

        Files are shared where the file system can: as clones, else as hard links.
        """
        with self._explained():
            names = [*artifact.manifest.files, MANIFEST_NAME]
            for name in names:
                (self.path / name).parent.mkdir(parents=True, exist_ok=True)
                share_file(artifact.path / name, self.path / name)
            _check_names(OpenDirectory(self.path), artifact.manifest)
            self._move(names)

    def _move(self, names: list[str]) -> None:
        for name in names:
            protect(self.path / name)
            sync(self.path / name)
        for parent in {parent for name in names for parent in Path(name).parents}:
            protect(self.path / parent)
        self._check_replaceable()
        try:
            self.path.rename(self.destination)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            exchange(self.path, self.destination)  # `path` is now the old one, removed at exit
        sync(self.destination.parent)

    def _check_replaceable(self) -> None:
        place = self.destination
        if not place.exists() and not place.is_symlink():
            return
        if place.is_dir() and not place.is_symlink():
            if not any(place.iterdir()):
                return
            with contextlib.suppress(OSError):
                if f'"{FORMAT}"'.encode() in (place / MANIFEST_NAME).read_bytes():
                    return
        raise ArtifactError(
            "refusing to replace a path that is not an infc artifact",
            where=str(place),
            hint="remove it, or choose another output",
        )

    def _acquire(self) -> None:
        try:
            self._lock.acquire()
        except Timeout:
            # No lock file and no error: the file system refused to make one.
            os.close(os.open(self._lock.lock_file, os.O_RDONLY))
            raise ArtifactError(
                "another process is writing this artifact",
                where=str(self.destination),
                hint="wait for it, or choose another output",
            ) from None

    def _release(self) -> None:
        # Removed while still held: whoever opened it meanwhile sees it has no name, and retries.
        Path(self._lock.lock_file).unlink(missing_ok=True)
        self._lock.release()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._cannot_write(error) from error

    def _cannot_write(self, error: OSError) -> ArtifactError:
        hints = {
            errno.ENOSPC: "free some space, or choose another output",
            errno.EDQUOT: "free some space, or choose another output",
            errno.EFBIG: "raise the limit on the size of a file (`ulimit -f`)",
        }
        reason = error.strerror or str(error)
        return ArtifactError(
            f"cannot write the artifact: {reason}",
            where=str(self.destination),
            hint=hints.get(error.errno or 0, "choose an output that can be written"),
        )


_WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
