"""Checkpoints of the Hugging Face hub's cache, which are directories of links."""

import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest

import infc
from infc.ir.artifact import Artifact
from infc.ir.errors import CheckpointError

from ..checkpoints import make_checkpoint, put_in_hub_cache
from .compiling import Lines

NAME = "an-org/small-model"
OPTIONS = ["backend=reference", "dtype=float32", "target=x86-64-v2"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two layers in shards, as plain files."""
    place = tmp_path_factory.mktemp("files") / "small-model"
    return make_checkpoint("llama", place, tokenizer=True, num_hidden_layers=2, shard_bytes=1 << 15)


@pytest.fixture(scope="module")
def plain(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    output = tmp_path_factory.mktemp("plain") / "a"
    return infc.compile(files, output, overrides=OPTIONS, verify=False, cache=False)


@pytest.fixture
def snapshot(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same checkpoint in a cache of the hub, which is out of reach."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return put_in_hub_cache(files, tmp_path / "hub", NAME)


def contents(artifact: Artifact) -> dict[str, bytes]:
    """Every file; the recipe in the manifest has the model's name as it was given."""
    names = artifact.manifest.files
    return {name: (artifact.path / name).read_bytes() for name in names}


@pytest.mark.parametrize("source", ["path", "link", "recipe", "id", "recipe inside"])
def test_a_snapshot_of_links_compiles(
    source: str, snapshot: Path, plain: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into the artifact of the files themselves; again, from the cache."""
    given = tmp_path / "model.yaml"
    match source:
        case "path":
            given = snapshot
        case "link":
            given = tmp_path / "link"
            given.symlink_to(snapshot)
        case "recipe":
            given.write_text(f"model: {snapshot}\n")
        case "id":
            given.write_text(f"model: {NAME}\n")
        case "recipe inside":  # a link too, into `blobs`: `.` is where it stands
            blob = snapshot.parents[1] / "blobs/0123"
            blob.write_text("model: .\n")
            (snapshot / "model.yaml").symlink_to("../../blobs/0123")
            given = snapshot
    monkeypatch.chdir(tmp_path)
    uncached = infc.compile(given, overrides=OPTIONS, verify=False, cache=False)
    assert uncached.path == tmp_path / "small-model.infc"
    assert contents(uncached) == contents(plain)
    for again in (False, True):
        progress = Lines()
        output = tmp_path / "cached"
        made = infc.compile(given, output, overrides=OPTIONS, verify=False, progress=progress)
        assert any("from the cache" in line for line in progress.lines) == again
        assert contents(made) == contents(plain)
    assert made.manifest.checkpoint == plain.manifest.checkpoint


def test_a_link_to_another_file_is_another_checkpoint(
    snapshot: Path, plain: Artifact, tmp_path: Path
) -> None:
    infc.compile(snapshot, tmp_path / "a", overrides=OPTIONS, verify=False)
    other = snapshot.parents[1] / "blobs/0123"
    other.write_text("{{ eos_token }}")
    (snapshot / "chat_template.jinja").unlink()
    (snapshot / "chat_template.jinja").symlink_to("../../blobs/0123")
    made = infc.compile(snapshot, tmp_path / "b", overrides=OPTIONS, verify=False)
    assert (made.path / "tokenizer/chat_template.jinja").read_text() == "{{ eos_token }}"


@pytest.mark.parametrize("pattern", ["config.json", "model-00002-of-*.safetensors"])
def test_a_link_that_leads_nowhere_is_named(pattern: str, snapshot: Path, tmp_path: Path) -> None:
    """As after blobs were removed; prose is not missed."""
    (path,) = snapshot.glob(pattern)
    path.resolve().unlink()
    (snapshot / "README.md").symlink_to("../../blobs/gone")
    with pytest.raises(CheckpointError, match=r"is a link to .*, which is not there") as caught:
        infc.compile(snapshot, tmp_path / "a", overrides=OPTIONS)
    assert caught.value.where == str(path)


def test_an_id_that_is_not_there_is_one_line(snapshot: Path, tmp_path: Path) -> None:
    shutil.rmtree(snapshot)
    (tmp_path / "model.yaml").write_text(f"model: {NAME}\n")
    with pytest.raises(CheckpointError, match=f"the hub does not provide '{NAME}'"):
        infc.compile(tmp_path / "model.yaml", tmp_path / "a", overrides=OPTIONS)
