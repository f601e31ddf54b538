"""The cache: found by what went in, never wrong, bounded, and costs nothing but a compilation."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from infc.driver import cache as cache_module
from infc.driver.cache import ArtifactCache, cache_key, cache_limit_bytes
from infc.driver.cli import run
from infc.driver.workplaces import one_at_a_time, temporary_output
from infc.ir.artifact import ArtifactWriter, open_artifact
from infc.ir.errors import UsageError

from ..ir.artifacts import WEIGHTS, write_artifact


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    place = tmp_path / "checkpoint"
    place.mkdir()
    (place / "config.json").write_text("{}")
    (place / "model.safetensors").write_bytes(b"12345678")
    return place


def test_a_key_depends_on_everything_that_shapes_the_artifact(checkpoint: Path) -> None:
    first = cache_key({"a": 1}, checkpoint)
    assert cache_key({"a": 1}, checkpoint) == first
    assert cache_key({"a": 2}, checkpoint) != first
    (checkpoint / "README.md").write_text("prose")
    assert cache_key({"a": 1}, checkpoint) == first
    (checkpoint / "model.safetensors").write_bytes(b"12345679")
    second = cache_key({"a": 1}, checkpoint)
    assert second != first
    (checkpoint / "chat_template.jinja").write_text("x")
    assert cache_key({"a": 1}, checkpoint) not in (first, second)


def test_a_key_sees_a_change_that_keeps_size_and_time(checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    os.utime(weights, ns=(10**18, 10**18))
    first = cache_key({}, checkpoint)
    weights.write_bytes(b"87654321")
    os.utime(weights, ns=(10**18, 10**18))
    assert cache_key({}, checkpoint) != first


def test_found_again(tmp_path: Path) -> None:
    cache = ArtifactCache()
    assert cache.find("k") is None
    artifact = open_artifact(write_artifact(tmp_path / "a"))
    assert cache.add("k", artifact) is None
    found = cache.find("k")
    assert found is not None
    assert found.identity == artifact.identity
    use = cache.use()
    assert use.num_artifacts == 1
    assert use.size_bytes > len(WEIGHTS)


def test_a_damaged_entry_is_dropped(tmp_path: Path, own_cache: Path) -> None:
    cache = ArtifactCache()
    cache.add("k", open_artifact(write_artifact(tmp_path / "a")))
    (own_cache / "artifacts/k/weights.safetensors").write_bytes(WEIGHTS[::-1])
    assert cache.find("k") is None
    assert cache.use().num_artifacts == 0


@pytest.fixture
def give_away(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Makes a file or directory another user's."""
    if os.geteuid() == 0:
        return lambda path: os.chown(path, 12345, -1, follow_symlinks=False)
    return lambda path: monkeypatch.setattr("os.geteuid", lambda: 12345)


def modes(root: Path) -> dict[str, str]:
    """The permissions of a directory, and of those below it down to the artifacts."""
    places = (root, *(path for path in root.glob("*") if path.is_dir()))
    return {path.name: oct(path.stat().st_mode & 0o777) for path in places}


def test_nobody_else_looks_into_the_cache(
    tmp_path: Path, own_cache: Path, checkpoint: Path
) -> None:
    own_cache.mkdir(exist_ok=True)
    own_cache.chmod(0o777)  # as an older infc left it under another umask
    cache_key({}, checkpoint)
    artifact = open_artifact(write_artifact(tmp_path / "a"))
    assert ArtifactCache().add("k", artifact) is None
    with one_at_a_time(own_cache, "k", lambda: None):
        pass
    temporary_output(own_cache)
    names = {own_cache.name, "artifacts", "checkpoints", "stamps", "compiling", "temporary"}
    assert modes(own_cache) == dict.fromkeys(names, "0o700")
    assert ArtifactCache().find("k") is not None


@pytest.mark.parametrize("name", ["", "code", "code/model.so", "manifest.json"])
@pytest.mark.parametrize("how", ["writable", "given away"])
def test_an_entry_that_others_could_have_written_is_refused(
    tmp_path: Path, own_cache: Path, give_away: Callable[[Path], None], name: str, how: str
) -> None:
    cache = ArtifactCache()
    artifact = open_artifact(write_artifact(tmp_path / "a"))
    cache.add("k", artifact)
    place = own_cache / "artifacts/k" / name
    if how == "writable":
        place.chmod(place.stat().st_mode | 0o002)
    else:
        give_away(place)
    remarks: list[str] = []
    assert cache.find("k", remarks.append) is None
    (remark,) = remarks
    assert remark.startswith("the cache is not used: ")
    assert remark.endswith("belongs to another user, or others can write to it")
    if how == "writable":  # the next compilation puts its own in the place
        assert str(place) in remark
        assert cache.add("k", artifact) is None
        assert cache.find("k", remarks.append) is not None and len(remarks) == 1


def test_the_cache_of_another_user_is_not_used(
    tmp_path: Path, own_cache: Path, give_away: Callable[[Path], None], checkpoint: Path
) -> None:
    cache = ArtifactCache()
    artifact = open_artifact(write_artifact(tmp_path / "a"))
    cache.add("k", artifact)
    give_away(own_cache)
    remarks: list[str] = []
    assert cache.find("k", remarks.append) is None
    assert f"{own_cache} belongs to another user" in remarks[0]
    assert cache.add("k2", artifact) == f"cannot write {own_cache}: belongs to another user"
    assert cache_key({}, checkpoint)  # without its memory
    with (
        pytest.raises(UsageError, match="the cache cannot be written: belongs to another user"),
        one_at_a_time(own_cache, "k", lambda: None),
    ):
        pass
    with pytest.raises(UsageError, match="the cache cannot be written: belongs to another user"):
        temporary_output(own_cache)


def test_what_others_could_have_remembered_is_not_believed(
    own_cache: Path, checkpoint: Path
) -> None:
    for path in checkpoint.iterdir():
        os.utime(path, ns=(10**18, 10**18))
    place = hashlib.sha256(os.fsencode(checkpoint.resolve())).hexdigest()[:32]
    stamps = {}
    for path in checkpoint.iterdir():
        state = path.stat()
        stamp = [state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns]
        stamps[path.name] = {"stamp": stamp, "digest": "planted"}
    right = cache_key({}, checkpoint)
    memory = own_cache / "checkpoints" / f"{place}.json"
    memory.parent.mkdir(parents=True, exist_ok=True)
    memory.write_text(json.dumps(stamps))
    assert cache_key({}, checkpoint) != right
    memory.write_text(json.dumps(stamps))
    memory.chmod(0o666)
    assert cache_key({}, checkpoint) == right


def test_the_longest_unused_goes_first(tmp_path: Path, own_cache: Path) -> None:
    artifact = open_artifact(write_artifact(tmp_path / "a"))
    cache = ArtifactCache()
    cache.add("k0", artifact)
    one = cache.use().size_bytes
    cache = ArtifactCache(limit_bytes=3 * one)
    for index in (1, 2):
        cache.add(f"k{index}", artifact)
    for index in range(3):
        os.utime(own_cache / f"artifacts/k{index}", (1000 + index, 1000 + index))
    assert cache.find("k0") is not None  # used just now
    cache.add("k3", artifact)
    assert sorted(os.listdir(own_cache / "artifacts")) == ["k0", "k2", "k3"]


def test_what_is_too_large_is_not_kept(tmp_path: Path) -> None:
    cache = ArtifactCache(limit_bytes=100)
    reason = cache.add("k", open_artifact(write_artifact(tmp_path / "a")))
    assert reason is not None
    assert "larger than the cache may be" in reason
    assert cache.use().num_artifacts == 0


def test_an_unwritable_cache_is_only_a_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = ArtifactCache(tmp_path / "file/cache")
    reason = cache.add("k", open_artifact(write_artifact(tmp_path / "a")))
    assert reason is not None
    assert "cannot write" in reason
    assert cache.find("k") is None
    assert cache.use().num_artifacts == 0


def test_clear(tmp_path: Path, own_cache: Path) -> None:
    cache = ArtifactCache()
    cache.add("k", open_artifact(write_artifact(tmp_path / "a")))
    assert cache.clear().num_artifacts == 1
    assert not own_cache.exists()
    assert cache.use().num_artifacts == 0
    assert os.listdir(own_cache.parent) == []


def test_clearing_that_is_killed_leaves_nothing_for_ever(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ArtifactCache()
    for key in ("k", "l"):
        cache.add(key, open_artifact(write_artifact(tmp_path / "a")))

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            cache.clear()
    assert os.listdir(own_cache.parent) == [own_cache.name]
    assert cache.use().num_artifacts == 1
    assert cache.prune().num_artifacts == 0
    (left,) = os.listdir(own_cache / "artifacts")
    assert left in ("k", "l"), "the other one was swept, though half removed"


def test_clearing_keeps_what_another_process_writes(tmp_path: Path, own_cache: Path) -> None:
    cache = ArtifactCache()
    artifact = open_artifact(write_artifact(tmp_path / "a"))
    with ArtifactWriter(own_cache / "artifacts/k") as writer:
        cache.clear()
        writer.commit_copy(artifact)
    found = cache.find("k")
    assert found is not None
    assert found.identity == artifact.identity


def test_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_limit_bytes() == 20 * 10**9
    for text, size in {"5GB": 5 * 10**9, "0": 0}.items():
        monkeypatch.setenv("INFC_CACHE_LIMIT", text)
        assert cache_limit_bytes() == size
    for text in ("lots", "auto", "-1"):
        monkeypatch.setenv("INFC_CACHE_LIMIT", text)
        with pytest.raises(UsageError, match="INFC_CACHE_LIMIT: not a size"):
            cache_limit_bytes()


def test_builds_of_one_model_are_told_apart() -> None:
    assert cache_module._options({}) == "dtype auto"
    older = {"quantization": "none", "dtype": "float32"}  # as a name, from before it was a section
    assert cache_module._options(older) == "dtype float32"
    recipe = {
        "dtype": "bfloat16",
        "quantization": {"scheme": "int8"},
        "kv_cache": {"dtype": "int8"},
    }
    assert cache_module._options(recipe) == "dtype bfloat16, weights int8, kv int8"


def test_what_is_kept_is_listed(tmp_path: Path, own_cache: Path) -> None:
    cache = ArtifactCache()
    assert cache.entries() == []
    artifact = open_artifact(write_artifact(tmp_path / "a"))
    for index in range(3):
        cache.add(f"k{index}", artifact)
    (own_cache / "artifacts/k1/manifest.json").unlink()
    for index in range(3):
        os.utime(own_cache / f"artifacts/k{index}", (1000 + index, 1000 + index))
    listed = cache.entries()
    assert [(entry.key, entry.model) for entry in listed] == [
        ("k2", "here"),
        ("k1", "damaged"),
        ("k0", "here"),
    ]
    assert (listed[0].backend, listed[0].target, listed[0].last_use) == ("cpp", "x86-64-v2", 1002)
    assert sum(entry.size_bytes for entry in listed) == cache.use().size_bytes


def test_a_limit_is_kept_and_applied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    cache = ArtifactCache()
    for index in range(2):
        cache.add(f"k{index}", open_artifact(write_artifact(tmp_path / "a")))
    one = cache.use().size_bytes // 2
    assert run(["cache", "limit", f"{one + 10}B"]) == 0
    assert "removed 1 artifact," in capsys.readouterr().out
    assert cache_limit_bytes() == one + 10
    assert [entry.key for entry in ArtifactCache().entries()] == ["k1"]
    monkeypatch.setenv("INFC_CACHE_LIMIT", "5GB")  # of this command alone, so it goes first
    assert cache_limit_bytes() == 5 * 10**9
    assert run(["cache", "limit"]) == 0
    assert capsys.readouterr().out == "5.00 GB\n"
    assert run(["cache", "limit", "lots"]) == 2
    assert "not a size: 'lots'" in capsys.readouterr().err


def test_pruning_sweeps_what_killed_processes_left(own_cache: Path) -> None:
    half = own_cache / "artifacts/.k.infc-partial-abc"
    half.mkdir(parents=True)
    (half / "weights.safetensors").write_bytes(b"half")
    assert run(["cache", "prune"]) == 0
    assert os.listdir(own_cache / "artifacts") == []
