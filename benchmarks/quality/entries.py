"""What is compared: models, and how infc and llama.cpp hold their weights."""

from __future__ import annotations

from dataclasses import dataclass

from tests.models.packaged import GEMMA3, QWEN_CODER, SMOLLM2, PackagedModel

BUNDLED = "tiny"
MODELS: dict[str, PackagedModel | None] = {
    "smollm2-135m": SMOLLM2,
    "gemma3-270m": GEMMA3,
    "qwen2.5-coder-0.5b": QWEN_CODER,
    BUNDLED: None,
}
"""By name the packages that carry a model; None: infc's own, which llama.cpp cannot read."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A way to hold the weights. `settings` are infc's, `--set` each; `gguf_type` llama.cpp's."""

    name: str
    settings: tuple[str, ...] = ()
    gguf_type: str | None = None

    @property
    def is_infc(self) -> bool:
        """Whether it is ours."""
        return self.gguf_type is None


_BETTER = 'rules: [{match: "*.down_proj", scheme: int8}]'
_SIX = 'rules: [{match: "*.mlp.*", scheme: int6}]'

ENTRIES = (
    Entry("infc bf16", ("quantization=none",)),
    Entry("infc int8", ("quantization=int8",)),
    Entry("infc int8, not scaled", ("quantization={scheme: int8, channel_scaling: none}",)),
    Entry("infc int8, nearest", ("quantization={scheme: int8, method: nearest}",)),
    Entry("infc int8, int8 cache", ("quantization=int8", "kv_cache.dtype=int8")),
    Entry("infc int4", ("quantization=int4",)),
    Entry("infc int4, nearest", ("quantization={scheme: int4, method: nearest}",)),
    Entry("infc int4, attention int4", ("quantization={scheme: int4, attention: int4}",)),
    Entry(
        "infc int4, attention and down_proj int8", (f"quantization={{scheme: int4, {_BETTER}}}",)
    ),
    Entry("infc int4, MLP int6", (f"quantization={{scheme: int4, {_SIX}}}",)),
    Entry("llama.cpp BF16", gguf_type="bf16"),
    Entry("llama.cpp Q8_0", gguf_type="q8_0"),
    Entry("llama.cpp Q4_K_M", gguf_type="q4_k_m"),
    Entry("llama.cpp Q4_0", gguf_type="q4_0"),
)
