"""Small random checkpoints under published names, with weights spread so that faults show."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers.utils import logging

from .configs import CONFIGS
from .configs.base import BOS_ID, Config, Refused, Tensors
from .configs.refused import REFUSED


def make_checkpoint(
    arch: str,
    directory: Path | str,
    *,
    seed: int = 0,
    dtype: str = "float32",
    tokenizer: bool = False,
    shard_bytes: int | None = None,
    **overrides: Any,
) -> Path:
    """Writes a random checkpoint of the model named `arch` and returns its directory.

    `overrides` replace entries of the configuration; `dtype` is that of the file; `shard_bytes`
    splits the weights into files of about that size. The same arguments give the same weights.
    """
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    model = make_model(arch, seed=seed, **overrides).to(getattr(torch, dtype))
    model.config.dtype = getattr(torch, dtype)
    size = {} if shard_bytes is None else {"max_shard_size": shard_bytes}
    logging.disable_progress_bar()
    model.save_pretrained(target, **size)
    _publish(target, arch, model.config)
    if tokenizer:
        write_tokenizer_files(target)
    return target


def make_model(arch: str, *, seed: int = 0, **overrides: Any) -> Any:
    """The model of `make_checkpoint` in float32, with transformers' own eager attention."""
    small = small_config(arch)
    logging.set_verbosity_error()
    config = transformers.AutoConfig.for_model(small.kind, **{**small.settings, **overrides})
    implementation = {"attn_implementation": "eager"}
    model = transformers.AutoModelForCausalLM.from_config(config, **implementation)
    spread_weights(model, seed)
    return model.eval()


def small_config(arch: str) -> Config | Refused:
    """The model of that name, whether infc compiles it or not."""
    return CONFIGS[arch] if arch in CONFIGS else REFUSED[arch]


def spread_weights(model: Any, seed: int) -> None:
    """Random weights wide enough that attention is not uniform and no norm or bias is idle."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.15, generator=generator)
            else:
                # Norms around one stay there (Gemma's are around zero: it adds the one itself).
                centre = 1.0 if bool((parameter == 1).all()) else 0.0
                parameter.normal_(centre, 0.3, generator=generator)
        for name, buffer in model.named_buffers():
            if buffer.is_floating_point() and name in model.state_dict():
                buffer.normal_(0.0, 0.3, generator=generator)


def _publish(directory: Path, arch: str, config: Any) -> None:
    """Gives the tensors the names that the model was published with."""
    publish = getattr(small_config(arch), "publish", None)
    if publish is not None:
        path = directory / "model.safetensors"
        tensors: Tensors = load_file(path)
        save_file(publish(tensors, config), path, metadata={"format": "pt"})


CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokenizer() -> Tokenizer:
    """A byte-level tokenizer: 256 bytes, `<s>` in front, `</s>` to end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS_ID)]
    )
    return backend


def write_tokenizer_files(directory: Path) -> None:
    """A byte-level tokenizer with a chat template, as transformers writes one."""
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer(), bos_token="<s>", eos_token="</s>"
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(directory)


def edit_config(directory: Path, **changes: Any) -> None:
    """Changes entries of a written config.json; None takes an entry away."""
    path = directory / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def put_in_hub_cache(directory: Path, cache: Path, repository: str) -> Path:
    """Lays a checkpoint out as the hub's cache does and returns its snapshot: files under their
    digests in `blobs`, a directory of links in `snapshots`, and `refs/main` naming the commit.
    """
    commit = hashlib.sha1(repository.encode()).hexdigest()
    root = cache / f"models--{repository.replace('/', '--')}"
    snapshot = root / "snapshots" / commit
    for place in (root / "blobs", root / "refs", snapshot):
        place.mkdir(parents=True)
    (root / "refs/main").write_text(commit)
    for path in directory.iterdir():
        data = path.read_bytes()
        blob = root / "blobs" / hashlib.sha256(data).hexdigest()
        blob.write_bytes(data)
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot
