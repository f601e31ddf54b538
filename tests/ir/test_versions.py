"""Manifests of the first version: read as this one says the same, and run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from infc import LLM, SamplingParams
from infc.ir.artifact import open_artifact
from infc.ir.errors import ArtifactError
from infc.ir.manifest import parse_manifest

from ..runtime.small_artifact import write_small_artifact
from .test_artifact import rewritten
from .version_1 import as_version_1, take_back

WRITTEN = Path(__file__).parent / "manifest-1.json"
"""What infc wrote for `write_small_artifact` when there was one program only."""


def test_a_manifest_that_was_written_then() -> None:
    text = WRITTEN.read_text()
    old = parse_manifest(text, where="m")
    assert list(old.programs) == ["main"]
    assert old.main.vocab_size == old.model.vocab_size == 288
    assert old.main.hidden_width == 16
    assert [group.name for group in old.main.resources] == ["full", "window"]
    # What is written today says the same, and the converter of these tests is that of then.
    again = parse_manifest(old.to_text(), where="m")
    assert again == old
    assert as_version_1(old.to_text()) == text


def test_an_artifact_of_then_runs(tmp_path: Path) -> None:
    new = write_small_artifact(tmp_path / "new")
    old = write_small_artifact(tmp_path / "old")
    take_back(old)
    assert json.loads((old / "manifest.json").read_text())["version"] == 1
    assert open_artifact(old).manifest == open_artifact(new).manifest
    said = []
    for path in (old, new):
        with LLM(path) as llm:
            outputs = llm.generate("the cat", SamplingParams(max_tokens=8))
            said.append(outputs[0].outputs[0].token_ids)
    assert said[0] == said[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv": {"groups": [], "speed": 1}}, "it has the key 'programs.main.kv.speed', which"),
        ({"speed": 1}, "it has the key 'speed', which this infc does not know"),
        ({"programs": {}}, r"it has the key 'programs \(version 1\)', which"),
        ({"kv": 3}, "main.resources: '3'"),
        ({"kv": []}, r"main.resources: '\[\]'"),
        ({"hidden_width": "wide"}, "outputs.hidden: .* is not the type of an array"),
        ({"hidden_width": "5"}, "outputs.hidden: .* is not the type of an array"),
        ({"hidden_width": 0}, r"outputs.hidden: 'f32\[R, 0\]', expected f32\[R, width\]"),
        ({"model": None}, "manifest.model: None"),
        ({"arena_bytes": -1}, "arena_bytes: -1 is outside"),
    ],
)
def test_a_damaged_one(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write_small_artifact(tmp_path / "a")
    take_back(path)
    rewritten(path, **changes)
    with pytest.raises(ArtifactError, match=message):
        open_artifact(path)
