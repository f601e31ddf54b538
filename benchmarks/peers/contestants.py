"""Who takes part: the peers, how each is installed, and every precision that is measured."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

SHAPES = ("135m", "0.5b", "1b")
DEFAULT_SHAPES = SHAPES[1:]


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A library. `requirements` names a file in `requirements/`; None: infc's own environment.

    `variables` are for its workers; `{environment}` stands for the environment's folder.
    `slow_start`: it takes so long that it is started once a run.
    """

    name: str
    engine: str
    module: str
    requirements: str | None = None
    variables: Mapping[str, str] = field(default_factory=dict)
    slow_start: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Contestant:
    """A peer at one precision. `model` is where its models lie in the peer's folder of models,
    `{shape}` standing for the shape; None: it reads the checkpoint. `bits`: what it is
    compared with. `settings` of infc's recipe count beside, and before, that of its bits."""

    name: str
    peer: Peer
    bits: int
    model: str | None = None
    settings: tuple[str, ...] = ()

    @property
    def scheme(self) -> str:
        """The value of `quantization` in infc's recipe."""
        return {16: "none", 8: "int8", 4: "int4"}[self.bits]

    @property
    def is_infc(self) -> bool:
        """Whether it is ours."""
        return self.peer is INFC


@dataclass(frozen=True, slots=True)
class Workdir:
    """The places in the folder that `setup` fills and `run` reads."""

    root: Path

    @property
    def checkpoints(self) -> Path:
        """Where `benchmarks/models.py` writes."""
        return self.root / "checkpoints"

    def checkpoint(self, shape: str) -> Path:
        """The checkpoint of a shape, as that script names it."""
        return self.checkpoints / f"random-{shape}"

    def environment(self, peer: Peer) -> Path:
        """The virtual environment of a peer."""
        return self.root / "environments" / peer.name

    def python(self, peer: Peer) -> Path:
        """The interpreter that runs a peer."""
        if peer.requirements is None:
            return Path(sys.executable)
        return self.environment(peer) / "bin" / "python"

    def model(self, contestant: Contestant, shape: str) -> Path:
        """What the contestant loads."""
        if contestant.model is None:
            return self.checkpoint(shape)
        return self.root / "models" / contestant.peer.name / contestant.model.format(shape=shape)

    def logs(self) -> Path:
        """What workers write to stderr, and what setting up prints."""
        return self.root / "logs"

    def missing(self, contestant: Contestant, shape: str) -> str | None:
        """Why it cannot take part, or None. Of infc only compiling can tell."""
        peer = contestant.peer
        if peer.requirements is None:
            if importlib.util.find_spec(peer.module) is None:
                return f"{peer.module} is not in this environment"
        elif not self._has_module(peer):
            return f"{peer.name} is not installed in {self.environment(peer)}"
        model = self.model(contestant, shape)
        if not contestant.is_infc and not model.exists():
            return f"its model {model} is not there"
        return None

    def _has_module(self, peer: Peer) -> bool:
        places = self.environment(peer).glob("lib/python*/site-packages")
        return any((place / peer.module).is_dir() for place in places)


INFC = Peer(name="infc", engine="infc_llm", module="infc")
LLAMA_CPP = Peer(
    name="llama.cpp",
    engine="llama_cpp_decode",
    module="llama_cpp",
    requirements="llama.cpp.txt",
)
ONNXRUNTIME = Peer(
    name="onnxruntime",
    engine="onnxruntime_genai_static",
    module="onnxruntime_genai",
    requirements="onnxruntime.txt",
)
OPENVINO = Peer(
    name="openvino",
    engine="openvino_genai_paged",
    module="openvino_genai",
    requirements="openvino.txt",
)
CTRANSLATE2 = Peer(
    name="ctranslate2",
    engine="ctranslate2_static",
    module="ctranslate2",
    requirements="ctranslate2.txt",
)
VLLM = Peer(
    name="vllm",
    engine="vllm_in_process",
    module="vllm",
    requirements="vllm.txt",
    # Its documentation asks for both on a CPU; the first is Debian's libtcmalloc-minimal4.
    variables={
        "LD_PRELOAD": "/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4"
        ":{environment}/lib/libiomp5.so"
    },
    slow_start=True,
)
TRANSFORMERS = Peer(name="transformers", engine="transformers_eager", module="transformers")

PEERS = (LLAMA_CPP, OPENVINO, ONNXRUNTIME, CTRANSLATE2, TRANSFORMERS, VLLM)
"""In the order in which they are set up."""

# Those of the same bits beside each other: they are compared, and take turns in this order.
# What the recipe does not know yet is left out by `run`, with the recipe's own words.
CONTESTANTS = (
    Contestant(name="infc-int4", peer=INFC, bits=4, model="{shape}-int4"),
    # Every matrix in blocks of 32, and rows in float32, as the model builder of its peer has it.
    Contestant(
        name="infc-onnx-int4",
        peer=INFC,
        bits=4,
        model="{shape}-onnx-int4",
        settings=(
            "backend=onnx",
            "onnx={dialect: onnxruntime, kv: auto}",
            "dtype=float32",
            "quantization={scheme: q4_0, head: q4_0, method: nearest}",
        ),
    ),
    Contestant(name="llama.cpp-q4_0", peer=LLAMA_CPP, bits=4, model="{shape}-q4_0.gguf"),
    Contestant(name="onnxruntime-int4", peer=ONNXRUNTIME, bits=4, model="{shape}-int4"),
    Contestant(name="openvino-int4", peer=OPENVINO, bits=4, model="{shape}-int4"),
    Contestant(name="infc-int8", peer=INFC, bits=8, model="{shape}-int8"),
    Contestant(name="llama.cpp-q8_0", peer=LLAMA_CPP, bits=8, model="{shape}-q8_0.gguf"),
    Contestant(name="openvino-int8", peer=OPENVINO, bits=8, model="{shape}-int8"),
    Contestant(name="ctranslate2-int8", peer=CTRANSLATE2, bits=8, model="{shape}-int8"),
    Contestant(name="infc-bf16", peer=INFC, bits=16, model="{shape}-bf16"),
    Contestant(name="llama.cpp-bf16", peer=LLAMA_CPP, bits=16, model="{shape}-bf16.gguf"),
    Contestant(name="vllm-bf16", peer=VLLM, bits=16),
    Contestant(name="transformers-bf16", peer=TRANSFORMERS, bits=16),
)
