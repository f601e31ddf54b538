"""An artifact that is opened while it is still being written."""

from __future__ import annotations

from pathlib import Path

from infc.ir.artifact import ArtifactWriter, open_artifact

from .artifacts import WEIGHTS, fill, manifest


def test_what_is_being_written_can_be_opened_before(tmp_path: Path) -> None:
    place = tmp_path / "a"
    with ArtifactWriter(place) as writer:
        fill(writer.path)
        early = writer.preview(manifest())
        assert early.weights_path.read_bytes() == WEIGHTS
        assert not place.exists()
        (writer.path / "report.json").write_text("{}")
        writer.commit(manifest())
    opened = open_artifact(place, "full")
    assert set(opened.manifest.files) == {*early.manifest.files, "report.json"}
    with ArtifactWriter(place) as writer:
        fill(writer.path)
        writer.preview(manifest())
        weights = writer.path / manifest().main.weights.file
        weights.write_bytes(WEIGHTS + bytes(16))  # whoever writes to it again is seen
        writer.commit(manifest())
    assert open_artifact(place, "full").weights_path.read_bytes() == WEIGHTS + bytes(16)
