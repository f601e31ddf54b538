"""The tokenizer of a checkpoint, written so that serving needs neither torch nor transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from ..ir.errors import CheckpointError
from ..ir.manifest import TokenizerFiles
from .config import read_json
from .generation import Vocabulary, generation_defaults
from .quiet import quiet_transformers
from .tokenizer_files import check_tokenizer_files

TOKENIZER_FILE: Final = "tokenizer/tokenizer.json"
TEMPLATE_FILE: Final = "tokenizer/chat_template.jinja"
TOOL_TEMPLATE_FILE: Final = "tokenizer/tool_use.jinja"

# What transformers calls the templates that it picks by itself, and where infc keeps them.
_TEMPLATES: Final = {"default": TEMPLATE_FILE, "tool_use": TOOL_TEMPLATE_FILE}

# Any of these says that the checkpoint means to have a tokenizer.
_SOURCES: Final = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)


def write_tokenizer(
    model_directory: Path | str,
    artifact_directory: Path | str,
    *,
    vocab_size: int | None = None,
    log: Callable[[str], None] = print,
) -> TokenizerFiles | None:
    """Writes `tokenizer/` into an artifact and returns what the manifest says of it.

    A tokenizer of the older kind is converted through transformers. `vocab_size` is the model's:
    ids outside of it that the checkpoint lists to end a text, or to ban, are left out with a line
    to `log`. None (and a line) where the checkpoint has no tokenizer; CheckpointError where it has
    one that cannot be read.
    """
    source, target = Path(model_directory), Path(artifact_directory)
    if not any((source / name).exists() for name in _SOURCES):
        log(f"no tokenizer in {source.name}: the artifact takes and gives token ids only")
        return None
    check_tokenizer_files(source, vocab_size)
    library = _load(source)
    path = target / TOKENIZER_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_backend_text(library, source), encoding="utf-8")
    templates = _chat_templates(library, log)
    for name, template in templates.items():
        (target / _TEMPLATES[name]).write_text(template, encoding="utf-8")
    generation = _optional_json(source / "generation_config.json")
    config = _text_settings(_optional_json(source / "config.json"))
    within = Vocabulary(vocab_size, log)
    known_bos = within.known("bos_token_id", _ids(library.bos_token_id)[:1])
    eos = within.known("eos_token_id", _eos_ids(library.eos_token_id, generation, config))
    return TokenizerFiles(
        file=TOKENIZER_FILE,
        bos=known_bos[0] if known_bos else None,
        eos=eos,
        chat_template=TEMPLATE_FILE if "default" in templates else None,
        generation=generation_defaults(generation, eos, within, _special_texts(library)),
        special_tokens=dict(sorted(library.special_tokens_map.items())),
        tool_template=TOOL_TEMPLATE_FILE if "tool_use" in templates else None,
    )


def _load(source: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(
                source, local_files_only=True, trust_remote_code=False
            )
    except Exception as error:
        # Tokenizers raise plain Exception, and each class what it likes.
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"the tokenizer cannot be read: {reason}", where=str(source)
        ) from error


def _backend_text(library: Any, source: Path) -> str:
    """The text of `tokenizer.json`."""
    backend = getattr(library, "backend_tokenizer", None)
    if backend is None:
        from transformers.convert_slow_tokenizer import convert_slow_tokenizer

        try:
            backend = convert_slow_tokenizer(library)
        except Exception as error:
            # As above: whatever the converter of one class does not expect.
            raise CheckpointError(
                f"tokenizer {type(library).__name__} cannot be converted: {error}",
                where=str(source),
            ) from error
    text: str = backend.to_str(pretty=False)
    return text


def _chat_templates(library: Any, log: Callable[[str], None]) -> dict[str, str]:
    """The templates that are used, by name: the default, and the one for chats with tools."""
    template = library.chat_template
    if template is None:
        return {}
    named = template if isinstance(template, Mapping) else {"default": template}
    left_out = [name for name in named if name not in _TEMPLATES]
    if left_out:
        log(f"chat templates {', '.join(left_out)} are left out: nothing here asks for them")
    return {name: str(text) for name, text in named.items() if name in _TEMPLATES}


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _text_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Of a model with other inputs, its text part's settings stand below, and some above too."""
    part = config.get("text_config")
    own = {key: value for key, value in config.items() if value is not None}
    return {**part, **own} if isinstance(part, dict) else config


def _ids(value: Any) -> tuple[int, ...]:
    listed = value if isinstance(value, list) else [value]
    return tuple(one for one in listed if isinstance(one, int) and not isinstance(one, bool))


def _special_texts(library: Any) -> list[str]:
    return [t.content for t in library.added_tokens_decoder.values() if t.special and t.content]


def _eos_ids(own: Any, generation: dict[str, Any], config: dict[str, Any]) -> tuple[int, ...]:
    """Whatever ends an answer by the word of the generation settings, the model or the tokenizer.

    Each of the three knows ends that another leaves out: a base model's end of text, the end of a
    turn.
    """
    listed = (generation.get("eos_token_id"), config.get("eos_token_id"), own)
    return tuple(dict.fromkeys(token for value in listed for token in _ids(value)))
