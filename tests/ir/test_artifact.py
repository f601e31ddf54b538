"""Artifacts: what was written is opened, no changed bit goes unseen, and others are refused."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from infc.ir import digests
from infc.ir.artifact import ArtifactWriter, open_artifact
from infc.ir.errors import ArtifactError, UsageError
from infc.ir.manifest import canonical_json, parse_manifest

from .artifacts import WEIGHTS, fill, manifest, write_artifact

pytestmark = pytest.mark.usefixtures("own_cache")


def files_of(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def test_written_and_opened(artifact: Path) -> None:
    opened = open_artifact(artifact)
    assert replace(opened.manifest, files={}) == manifest()
    assert opened.weights_path.read_bytes() == WEIGHTS
    assert opened.entry_path == artifact / "code/model.so"
    assert os.listdir(artifact.parent) == ["model.infc"]


def test_shown_in_a_line(artifact: Path) -> None:
    opened = open_artifact(artifact)
    shown = f"{artifact}', model='toy', identity='{opened.identity[:12]}…')"
    assert repr(opened) == f"Artifact('{shown}"


def test_manifest_round_trip(artifact: Path) -> None:
    text = (artifact / "manifest.json").read_text()
    assert parse_manifest(text, where="").to_text() == text


def test_equal_inputs_give_equal_bytes(tmp_path: Path) -> None:
    one, two = write_artifact(tmp_path / "one"), write_artifact(tmp_path / "deeper/two")
    assert [p.relative_to(one) for p in files_of(one)] == [
        p.relative_to(two) for p in files_of(two)
    ]
    assert [p.read_bytes() for p in files_of(one)] == [p.read_bytes() for p in files_of(two)]
    assert open_artifact(one).identity == open_artifact(two).identity


@pytest.mark.parametrize("verify", ["stamp", "full"])
def test_a_thousand_flipped_bits_are_caught(artifact: Path, verify: str) -> None:
    """Over all files in turn, with a stamp from before, and each restored afterwards."""
    chosen = random.Random(7)
    files = files_of(artifact)
    assert len(files) == 4
    open_artifact(artifact)
    for turn in range(1000):
        path = files[turn % len(files)]
        whole = path.read_bytes()
        bit = chosen.randrange(8 * len(whole))
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError):
            open_artifact(artifact, verify)  # type: ignore[arg-type]
        path.write_bytes(whole)
    open_artifact(artifact)


def test_chunks_of_a_large_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(digests, "_READ_BYTES", 77)
    path = write_artifact(tmp_path / "a")
    listed = open_artifact(path).manifest.files["weights.safetensors"]
    assert listed.chunks is not None
    assert len(listed.chunks) == 6
    for at in (0, 999, 1000, len(WEIGHTS) - 1):
        damaged = bytearray(WEIGHTS)
        damaged[at] ^= 1
        (path / "weights.safetensors").write_bytes(damaged)
        first = at // 1000 * 1000
        last = min(first + 1000, len(WEIGHTS)) - 1
        with pytest.raises(ArtifactError, match=f"its bytes {first} to {last} do not match"):
            open_artifact(path)


def test_weights_may_be_checked_later(artifact: Path) -> None:
    (artifact / "weights.safetensors").write_bytes(WEIGHTS[::-1])
    opened = open_artifact(artifact, weights="later")
    assert opened.verify_weights() is opened.verify_weights()
    with pytest.raises(ArtifactError, match=r"weights.safetensors: its 5120 bytes do not match"):
        opened.verify_weights().result()


def age(root: Path) -> None:
    """Makes the files look old enough for a stamp to hold."""
    for path in files_of(root):
        os.utime(path, ns=(10**18, 10**18))


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    read: list[str] = []
    inner = digests._sha256

    def counted(handle: int, start: int, length: int) -> str:
        read.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
        return inner(handle, start, length)

    monkeypatch.setattr(digests, "_sha256", counted)
    return read


def test_a_stamp_spares_the_next_reading(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "_SETTLED_NS", -(10**12))
    read = count_reads(monkeypatch)
    open_artifact(artifact)
    assert sorted(read) == ["model.so", "tokenizer.json", "weights.safetensors"]
    read.clear()
    open_artifact(artifact)
    assert read == []
    os.utime(artifact / "code/model.so", ns=(10**18, 10**18))
    open_artifact(artifact)
    assert read == ["model.so"]
    read.clear()
    open_artifact(artifact, "full")
    assert len(read) == 3


def test_a_file_just_changed_gets_no_stamp(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "_SETTLED_NS", 10**12)
    read = count_reads(monkeypatch)
    open_artifact(artifact)
    open_artifact(artifact)
    assert len(read) == 6


def test_a_damaged_stamp_file_only_costs_reading(artifact: Path) -> None:
    open_artifact(artifact)
    (stamps,) = Path(os.environ["XDG_CACHE_HOME"]).rglob("*.json")
    for text in ("", "[]", '{"manifest": 3}', '{"manifest": "x", "stamps": []}'):
        stamps.write_text(text)
        assert open_artifact(artifact).manifest.backend == "cpp"


@pytest.mark.parametrize("place", ["/dev/null", "/proc"])
def test_no_place_for_stamps_only_costs_reading(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", place)
    read = count_reads(monkeypatch)
    for _ in range(2):
        assert open_artifact(artifact).manifest.backend == "cpp"
    assert len(read) == 6


def remove(path: Path) -> None:
    (path / "tokenizer/tokenizer.json").unlink()


def add(path: Path) -> None:
    (path / "code/extra.so").write_bytes(b"x")


def link(path: Path) -> None:
    target = path / "code/model.so"
    target.rename(path.parent / "elsewhere")
    target.symlink_to(path.parent / "elsewhere")


def link_directory(path: Path) -> None:
    (path / "code").rename(path.parent / "elsewhere")
    (path / "code").symlink_to(path.parent / "elsewhere")


def pipe(path: Path) -> None:
    os.mkfifo(path / "pipe")


def shorten(path: Path) -> None:
    (path / "weights.safetensors").write_bytes(WEIGHTS[:-1])


def link_manifest(path: Path) -> None:
    (path / "manifest.json").rename(path.parent / "elsewhere")
    (path / "manifest.json").symlink_to(path.parent / "elsewhere")


def enlarge_manifest(path: Path) -> None:
    os.truncate(path / "manifest.json", (256 << 20) + 1)


def nest(path: Path) -> None:
    (path / "/".join("d" * 100)).mkdir(parents=True)


def lose_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def lose_all(path: Path) -> None:
    shutil.rmtree(path)


def become_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("hello")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (remove, "'tokenizer/tokenizer.json' is missing"),
        (add, "'code/extra.so' is not listed"),
        (link, "'code/model.so' is a symbolic link"),
        (link_directory, "'code' is a symbolic link"),
        (pipe, "'pipe' is neither a file nor a directory"),
        (link_manifest, "'manifest.json' is a symbolic link"),
        (enlarge_manifest, "manifest.json: far too large for a manifest: 256.0 MiB"),
        (nest, "cannot be read: directories nest too deeply"),
        (shorten, "has 5119 bytes instead of 5120"),
        (lose_manifest, "no manifest.json here"),
        (lose_all, "does not exist"),
        (become_file, "is not a directory"),
    ],
)
def test_refused(artifact: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(artifact)
    with pytest.raises(ArtifactError, match=message):
        open_artifact(artifact)


def test_an_artifact_of_links_is_refused_with_what_to_do(artifact: Path) -> None:
    snapshot = artifact.parent / "of links"
    for path in files_of(artifact):
        place = snapshot / path.relative_to(artifact)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(path)
    with pytest.raises(ArtifactError, match=r"'manifest\.json' is a symbolic link") as caught:
        open_artifact(snapshot)
    assert f"cp -rL '{snapshot}' COPY" in str(caught.value.hint)
    shutil.copytree(snapshot, artifact.parent / "copy", symlinks=False)
    assert open_artifact(artifact.parent / "copy") is not None
    # The directory itself may be reached through one.
    (artifact.parent / "linked").symlink_to(artifact)
    assert open_artifact(artifact.parent / "linked").identity == open_artifact(artifact).identity


def test_one_that_is_replaced_while_it_is_open_is_not_mixed_with_the_other(artifact: Path) -> None:
    opened = open_artifact(artifact, weights="later")
    name = "tokenizer/tokenizer.json"
    before = opened.read_text(name)
    opened.check_in_place(name)
    artifact.rename(artifact.with_name("aside"))
    with ArtifactWriter(artifact) as writer:
        fill(writer.path)
        (writer.path / name).write_text('{"model": {"another": 1}}')
        (writer.path / "weights.safetensors").write_bytes(WEIGHTS[::-1])
        writer.commit(manifest())
    assert opened.read_text(name) == before
    opened.verify_weights().result()
    with pytest.raises(ArtifactError, match="was replaced while it was being opened"):
        opened.check_in_place(name)
    shutil.rmtree(artifact.with_name("aside"))
    for read in (opened.read_text, opened.open_file):
        with pytest.raises(ArtifactError, match="was replaced while it was being opened"):
            read(name)


@pytest.mark.parametrize("umask", [0o002, 0o000])
def test_nobody_else_may_write_to_the_files_of_an_artifact(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        files = files_of(write_artifact(tmp_path / "a"))
    finally:
        os.umask(before)
    assert [oct(path.stat().st_mode & 0o777) for path in files] == ["0o644"] * len(files)


def rewritten(path: Path, main: Mapping[str, object] | None = None, **changes: object) -> None:
    """Writes a manifest that is consistent with its digest and wrong otherwise.

    `main` are changes of the main program.
    """
    import hashlib

    data = json.loads((path / "manifest.json").read_text())
    del data["digest"]
    data.update(changes)
    if main is not None:
        data["programs"]["main"].update(main)
    digest = hashlib.sha256(canonical_json(data).encode()).hexdigest()
    (path / "manifest.json").write_text(canonical_json({**data, "digest": digest}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"version": 3},
            r"made by a newer infc \(0.1.0\): its format has version 3, .* reads up to 2",
        ),
        ({"version": True}, "there is no format version True"),
        ({"version": 0}, "there is no format version 0"),
        ({"version": 3, "infc_version": None}, "made by a newer infc: its format has version 3"),
        ({"format": "zip"}, "not the manifest of an infc artifact"),
        ({"files": {"../x": {"bytes": 1, "sha256": "0"}}}, r"unsafe name '\.\./x'"),
        ({"files": {"/etc/passwd": {"bytes": 1, "sha256": "0"}}}, "unsafe name"),
        ({"files": {"a/./b": {"bytes": 1, "sha256": "0"}}}, "unsafe name"),
        ({"main": {"arena_bytes": "many"}}, "main.arena_bytes: 'many', expected int"),
        ({"main": {"arena_bytes": True}}, "main.arena_bytes: True, expected int"),
        ({"main": {"limits": {"max_context": 3}}}, r"main.limits: .*missing 3 required"),
        ({"surprise": 1}, r"newer infc \(0.1.0\): it has the key 'surprise', which this infc does"),
        ({"main": {"resources": [{"speed": 1}]}}, "has the key 'programs.main.resources.speed',"),
        ({"main": {"resources": [{"kind": "ring"}]}}, "the key 'programs.main.resources.kind',"),
        ({"tokenizer": {"pieces": 1}}, "it has the key 'tokenizer.pieces', which"),
        ({"recipe": {"runtime": "fast"}}, "manifest.recipe.runtime: 'fast', expected a mapping"),
        ({"main": {"arena_bytes": 10**4000}}, "arena_bytes: a number of more than twenty digits"),
        ({"main": {"entry": {"kind": "exe", "file": "a"}}}, "main.entry.kind: 'exe'"),
        ({"main": {"weights": {"file": "w", "tensors": []}}}, "uses 'w' and does not list it"),
        ({"main": {"outputs": {"logits": "f32[R, 63]"}}}, "the logits are not of the vocabulary"),
        ({"main": {"outputs": {}}}, "the logits are not of the vocabulary"),
        ({"main": {"inputs": {"x": "f32[R, ]"}}}, r"inputs.x: 'f32\[R, \]' is not the type"),
        ({"main": {"inputs": {"x": "bf16[R]"}}}, "arrays of bf16 are never handed over"),
        ({"main": {"inputs": {"x": "f32[D]"}}}, "the symbol D has no bound"),
        ({"main": {"inputs": {"x": "f32[4294967296]"}}}, "inputs.x: 4294967296 is outside"),
        ({"main": {"rank": -1}}, "main.rank: -1 is outside"),
        (
            {"main": {"weights": {"file": "w", "tensors": ["a"], "shared": ["b"]}}},
            "weights.shared: 'b' is not among the tensors of programs.main",
        ),
        ({"main": {"outputs": {"hidden": "f32[T, 8]"}}}, r"hidden: 'f32\[T, 8\]', expected"),
        ({"main": {"inputs": {"input_ids": "i32[R]"}}}, r"input_ids: 'i32\[R\]', expected i32"),
        (
            {"main": {"weights": {"file": "w", "tensors": ["a"], "shared": ["a"]}}},
            "the main program's are its own",
        ),
    ],
)
def test_refused_manifest(artifact: Path, changes: dict[str, Any], message: str) -> None:
    rewritten(artifact, **changes)
    with pytest.raises(ArtifactError, match=message):
        open_artifact(artifact)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["main", "Head"], "'Head' cannot be the name of a program"),
        (["main", "../head"], "'../head' cannot be the name of a program"),
        (["head"], "there is no 'main'"),
    ],
)
def test_names_of_programs(artifact: Path, names: list[str], message: str) -> None:
    main = json.loads((artifact / "manifest.json").read_text())["programs"]["main"]
    rewritten(artifact, programs={"main": main, "draft-2": main})
    opened = open_artifact(artifact).manifest
    assert opened.program("draft-2") == opened.main
    with pytest.raises(UsageError, match=r"no program 'drat-2' .did you mean 'draft-2'"):
        opened.program("drat-2")
    rewritten(artifact, programs=dict.fromkeys(names, main))
    with pytest.raises(ArtifactError, match=message):
        open_artifact(artifact)


def test_digests_that_do_not_cover_a_file(artifact: Path) -> None:
    data = json.loads((artifact / "manifest.json").read_text())
    data["files"]["weights.safetensors"] = {"bytes": 5120, "chunk_bytes": 5119, "chunks": ["0"]}
    rewritten(artifact, files=data["files"])
    with pytest.raises(ArtifactError, match="do not cover it"):
        open_artifact(artifact)


def test_opening_needs_no_torch(artifact: Path) -> None:
    script = (
        "import sys; from infc.ir.artifact import open_artifact; open_artifact(sys.argv[1]);"
        "print(*{'torch', 'numpy', 'transformers'} & set(sys.modules))"
    )
    run = [sys.executable, "-c", script, str(artifact)]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout.split() == []


def test_a_way_to_verify_that_nobody_knows(artifact: Path) -> None:
    """Above all not taken for one that reads less than was meant."""
    with pytest.raises(UsageError, match="verify is 'all'"):
        open_artifact(artifact, "all")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("backend", "kind", "fine"),
    [
        ("cpp", "cpp-shared-library", True),
        ("reference", "cpp-shared-library", False),
        ("cpp", "program", False),
        ("cpp", "", False),
        ("unknown", "anything", True),  # of a plug-in perhaps, which the executor's room checks
    ],
)
def test_the_kind_of_the_entry_is_that_of_the_backend(backend: str, kind: str, fine: bool) -> None:
    made = manifest()
    entry = replace(made.main.entry, kind=kind)
    text = replace(made.with_main(entry=entry), backend=backend).to_text()
    if fine:
        assert parse_manifest(text, where="m").main.entry.kind == kind
    else:
        with pytest.raises(ArtifactError, match=rf"entry\.kind: '{kind}', but .* {backend} makes"):
            parse_manifest(text, where="m")
