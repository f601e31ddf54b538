"""`infc.LLM` and `infc.AsyncLLM`, opened with a model that is not compiled, or with an artifact."""

from __future__ import annotations

import asyncio
import importlib.util
from pathlib import Path
from typing import Any

import pytest

import infc
from infc.driver.cache import ArtifactCache
from infc.ir.artifact import open_artifact
from infc.ir.errors import ToolchainError, UsageError

from ..checkpoints import make_checkpoint
from ..runtime.small_artifact import write_small_artifact

QUICK = {"backend": "reference", "dtype": "float32"}
PARAMS = infc.SamplingParams(max_tokens=3, ignore_eos=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two layers."""
    place = tmp_path_factory.mktemp("source") / "llama"
    return make_checkpoint("llama", place, tokenizer=True, num_hidden_layers=2)


def test_a_checkpoint_is_compiled_into_the_cache(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with infc.LLM(checkpoint, overrides=QUICK) as llm:
        (answer,) = llm.generate([[1, 2, 3]], PARAMS)
    assert "compiling llama (next time, " in capsys.readouterr().err
    (kept,) = ArtifactCache().entries()

    async def again() -> list[int]:
        async with infc.AsyncLLM(checkpoint, overrides=QUICK) as llm:
            parts = [part async for part in llm.generate([1, 2, 3], PARAMS)]
        return [token for part in parts for token in part.outputs[0].token_ids]

    assert asyncio.run(again()) == list(answer.outputs[0].token_ids)
    assert capsys.readouterr().err == ""
    assert [entry.key for entry in ArtifactCache().entries()] == [kept.key]


@pytest.mark.parametrize("kind", [infc.LLM, infc.AsyncLLM])
def test_an_artifact_takes_no_overrides(kind: Any, tmp_path: Path) -> None:
    path = write_small_artifact(tmp_path / "small")
    for model in (path, str(path), open_artifact(path)):
        with pytest.raises(UsageError, match="this is a compiled artifact"):
            kind(model, overrides=QUICK)


@pytest.mark.parametrize("kind", [infc.LLM, infc.AsyncLLM])
def test_notes_are_warnings_where_the_model_is_opened(kind: Any, tmp_path: Path) -> None:
    path = write_small_artifact(tmp_path / "small")
    with pytest.warns(UserWarning, match="max_context is reduced to") as caught:
        llm = kind(path, kv_memory="10KiB")
    assert caught[0].filename == __file__
    closing = llm.close()
    if closing is not None:
        asyncio.run(closing)
    notes: list[str] = []
    with infc.LLM(open_artifact(path), kv_memory="10KiB", on_note=notes.append):
        assert len(notes) == 1


def test_an_argument_that_nobody_knows_is_told_before_compiling(checkpoint: Path) -> None:
    with pytest.raises(UsageError, match=r"infc\.LLM has no option 'max_contxt'"):
        infc.LLM(checkpoint, max_contxt=64)
    with pytest.raises(UsageError, match="verify is 'maybe'"):
        infc.LLM(checkpoint, verify="maybe")  # type: ignore[arg-type]
    assert ArtifactCache().entries() == []


def test_without_torch_it_says_that_nothing_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "torch" else find(name)
    )
    expected = r"build/gone is not an artifact, and compiling it needs torch, .*'infc\[compile\]'"
    with pytest.raises(ToolchainError, match=expected):
        infc.LLM("build/gone")
