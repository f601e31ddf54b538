"""Tokenizers are written so that `tokenizers` alone gives what transformers gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from infc.frontend.tokenizer import (
    TEMPLATE_FILE,
    TOKENIZER_FILE,
    TOOL_TEMPLATE_FILE,
    in_fewer_bytes,
    write_tokenizer,
)
from infc.ir.errors import CheckpointError

from ..checkpoints import CHAT_TEMPLATE, write_tokenizer_files
from ..configs.base import BOS_ID, EOS_ID, VOCAB_SIZE


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    write_tokenizer_files(directory)
    return directory


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    """What was written, as `tokenizers` reads it, and the library's own."""
    root = tmp_path_factory.mktemp("pair")
    write_tokenizer_files(root)
    write_tokenizer(root, root / "artifact", log=lambda _: None)
    ours = Tokenizer.from_file(str(root / "artifact" / TOKENIZER_FILE))
    return ours, transformers.AutoTokenizer.from_pretrained(root)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_same_ids_and_text(pair: tuple[Tokenizer, Any], text: str) -> None:
    ours, library = pair
    ids = ours.encode(text).ids
    assert ids == library(text)["input_ids"]
    assert ids[0] == BOS_ID
    assert ours.decode(ids) == text


def bpe(*merges: tuple[str, str]) -> str:
    """A tokenizer with these merges, as `tokenizers` writes it."""
    parts = [*"#versionab ", *(part for merge in merges for part in merge)]
    texts = dict.fromkeys([*parts, *("".join(merge) for merge in merges)])
    vocabulary = {text: index for index, text in enumerate(texts)}
    return Tokenizer(models.BPE(vocabulary, list(merges))).to_str()


@given(st.lists(st.sampled_from([("a", "b"), ("b", "a"), ("ab", "a"), ("a", "a")]), unique=True))
def test_merges_take_fewer_bytes_and_mean_the_same(merges: list[tuple[str, str]]) -> None:
    known, kept = {"a", "b"}, []
    for merge in merges:
        if known >= set(merge):
            known.add("".join(merge))
            kept.append(merge)
    text = bpe(*kept)
    short = in_fewer_bytes(text)
    assert len(short) < len(text) or not kept
    assert Tokenizer.from_str(short).to_str() == Tokenizer.from_str(text).to_str()


def test_merges_that_have_no_short_form_stay() -> None:
    """A part with a space, or a text that would be a comment."""
    for merge in ((" ", "a"), ("#version", "a")):
        assert in_fewer_bytes(bpe(merge)) == bpe(merge)
    assert in_fewer_bytes("{}") == "{}"


def test_what_the_manifest_is_told(model: Path, tmp_path: Path) -> None:
    (model / "generation_config.json").write_text(
        json.dumps(
            {
                "eos_token_id": [EOS_ID, 3],
                "pad_token_id": 5,
                "temperature": 0.7,
                "top_k": None,
                "typical_p": 0.9,
                "transformers_version": "5",
                "min_p": float("inf"),
            }
        )
    )
    files = write_tokenizer(model, tmp_path / "out", log=lambda _: None)
    assert files is not None
    assert (files.file, files.chat_template) == (TOKENIZER_FILE, TEMPLATE_FILE)
    assert (files.bos, files.eos) == (BOS_ID, (EOS_ID, 3))
    assert files.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert files.generation == {"temperature": 0.7, "typical_p": 0.9}
    assert (tmp_path / "out" / TEMPLATE_FILE).read_text() == CHAT_TEMPLATE


def test_ids_outside_the_vocabulary_are_left_out_and_named(model: Path, tmp_path: Path) -> None:
    settings = {
        "eos_token_id": [EOS_ID, 9999],
        "suppress_tokens": [7, -1, 400],
        "bad_words_ids": [[8], [9, 400], [EOS_ID]],
        "sequence_bias": [[[5], -1.0], [[400], 2.0]],
        "stop_strings": ["User:"],
        "forced_eos_token_id": 5,
        "temperature": 0.5,
    }
    (model / "generation_config.json").write_text(json.dumps(settings))
    lines: list[str] = []
    files = write_tokenizer(model, tmp_path / "out", vocab_size=VOCAB_SIZE, log=lines.append)
    assert files is not None
    assert files.eos == (EOS_ID,)
    assert files.generation == {
        "suppress_tokens": [7],
        "bad_words_ids": [[8]],
        "sequence_bias": [[[5], -1.0]],
        "stop_strings": ["User:"],
        "forced_eos_token_id": 5,
        "temperature": 0.5,
    }
    outside = f"left out: outside the vocabulary of {VOCAB_SIZE} tokens"
    assert lines == [
        f"eos_token_id 9999 {outside}",
        f"bad_words_ids [9, 400] {outside}",
        f"sequence_bias [[400], 2.0] {outside}",
        f"suppress_tokens -1, 400 {outside}",
        "generation_config.json sets bad_words_ids, sequence_bias, stop_strings, suppress_tokens: "
        "the default of every request",
    ]


def test_stop_strings_that_could_never_be_found_are_left_out_and_named(
    model: Path, tmp_path: Path
) -> None:
    """One as the default of every request would have every request refused."""
    settings = {"stop_strings": ["</s>\n", "</s>", "User:"]}
    (model / "generation_config.json").write_text(json.dumps(settings))
    lines: list[str] = []
    files = write_tokenizer(model, tmp_path / "out", log=lines.append)
    assert files is not None
    assert files.generation == {"stop_strings": ["</s>", "User:"]}
    assert any("the stop string '</s>\\n' left out" in line for line in lines)


def test_end_tokens_of_the_part_that_is_compiled(model: Path, tmp_path: Path) -> None:
    """Models with other inputs say them with the text part, above, or in both places.

    The tokenizer's own end, 257, is one too.
    """
    for above, expected in (({}, (5, 257)), ({"eos_token_id": [6, 7]}, (6, 7, 257))):
        part = {"model_type": "llama", "eos_token_id": 5}
        config = {"model_type": "llava", "text_config": part, **above}
        (model / "config.json").write_text(json.dumps(config))
        files = write_tokenizer(model, tmp_path / "out", log=lambda _: None)
        assert files is not None
        assert files.eos == expected


def test_the_same_bytes_each_time(model: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_tokenizer(model, tmp_path / name, log=lambda _: None)
    a, b = ((tmp_path / name / TOKENIZER_FILE).read_bytes() for name in ("a", "b"))
    assert a == b


def test_every_end_is_kept_and_no_token_is_made_up(model: Path, tmp_path: Path) -> None:
    """The model's configuration names ids for a tokenizer that has no such token."""
    config = json.loads((model / "tokenizer_config.json").read_text())
    del config["bos_token"]
    (model / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": "<pad>"}))
    (model / "config.json").write_text(
        json.dumps({"model_type": "llama", "eos_token_id": [7, 5], "bos_token_id": 5})
    )
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6]}))
    files = write_tokenizer(model, tmp_path / "out", log=lambda _: None)
    assert files is not None
    assert (files.bos, files.eos) == (None, (5, 6, 7, EOS_ID))
    assert files.special_tokens == {"eos_token": "</s>", "pad_token": "<pad>"}


@pytest.mark.parametrize("as_list", [True, False], ids=["list", "directory"])
def test_templates_with_names(model: Path, tmp_path: Path, as_list: bool) -> None:
    """Older checkpoints list them in tokenizer_config.json; newer ones have a directory."""
    named = {"default": "plain", "tool_use": "with tools", "rag": "with documents"}
    if as_list:
        (model / "chat_template.jinja").unlink()
        config = json.loads((model / "tokenizer_config.json").read_text())
        config["chat_template"] = [{"name": k, "template": v} for k, v in named.items()]
        (model / "tokenizer_config.json").write_text(json.dumps(config))
    else:
        (model / "chat_template.jinja").write_text(named.pop("default"))
        (model / "additional_chat_templates").mkdir()
        for name, text in named.items():
            (model / f"additional_chat_templates/{name}.jinja").write_text(text)
    lines: list[str] = []
    files = write_tokenizer(model, tmp_path / "out", log=lines.append)
    assert files is not None
    assert (files.chat_template, files.tool_template) == (TEMPLATE_FILE, TOOL_TEMPLATE_FILE)
    assert (tmp_path / "out" / TEMPLATE_FILE).read_text() == "plain"
    assert (tmp_path / "out" / TOOL_TEMPLATE_FILE).read_text() == "with tools"
    assert lines == ["chat templates rag are left out: nothing here asks for them"]


def test_eos_of_the_configuration_and_no_template(model: Path, tmp_path: Path) -> None:
    (model / "chat_template.jinja").unlink()
    (model / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 5}))
    files = write_tokenizer(model, tmp_path / "out", log=lambda _: None)
    assert files is not None
    assert files.eos == (5, EOS_ID)
    assert files.chat_template is None
    assert not (tmp_path / "out" / TEMPLATE_FILE).exists()


def test_no_tokenizer(tmp_path: Path) -> None:
    lines: list[str] = []
    assert write_tokenizer(tmp_path, tmp_path / "out", log=lines.append) is None
    assert "token ids only" in lines[0]
    assert not (tmp_path / "out").exists()


def test_damaged_tokenizer(model: Path, tmp_path: Path) -> None:
    (model / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: cannot be read"):
        write_tokenizer(model, tmp_path / "out", log=lambda _: None)


@pytest.mark.parametrize("text", ["{}", '{"added_tokens": []}', '{"model": 3}'])
def test_a_tokenizer_without_a_model(text: str, model: Path, tmp_path: Path) -> None:
    (model / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: .*it has no model"):
        write_tokenizer(model, tmp_path / "out", log=lambda _: None)


def test_settings_that_are_a_list(model: Path, tmp_path: Path) -> None:
    (model / "tokenizer_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: is not a JSON object"):
        write_tokenizer(model, tmp_path / "out", log=lambda _: None)


@pytest.mark.parametrize("place", ["vocab", "added_tokens"])
def test_an_id_far_above_the_vocabulary(place: str, model: Path, tmp_path: Path) -> None:
    data = json.loads((model / "tokenizer.json").read_text())
    limit = 2 * VOCAB_SIZE + (1 << 20)
    if place == "vocab":
        data["model"]["vocab"]["zz"] = limit
    else:
        data["added_tokens"].append({**data["added_tokens"][0], "content": "zz", "id": limit})
    (model / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=rf"tokenizer\.json: token 'zz' has the id {limit}"):
        write_tokenizer(model, tmp_path / "out", vocab_size=VOCAB_SIZE, log=lambda _: None)


def test_tokenizer_from_a_vocabulary(tmp_path: Path) -> None:
    """A checkpoint as gpt2 first was: vocab.json and merges.txt, no tokenizer.json."""
    model = tmp_path / "model"
    model.mkdir()
    vocabulary = {"<|endoftext|>": 0, "a": 1, "b": 2, "ab": 3, "Ġ": 4}
    (model / "vocab.json").write_text(json.dumps(vocabulary))
    (model / "merges.txt").write_text("#version: 0.2\na b\n")
    (model / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    files = write_tokenizer(model, tmp_path / "out", log=lambda _: None)
    assert files is not None
    backend = Tokenizer.from_file(str(tmp_path / "out" / files.file))
    assert backend.encode("ab a").ids == [3, 4, 1]
    assert backend.decode([3, 4, 1]) == "ab a"
