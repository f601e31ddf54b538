"""The section `quantization` of a recipe."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from ..ir.schemes import ADOPTING, AUTO, has_four_bits, is_quantizing
from .recipe_keys import CountOrAuto, Section, key
from .texts import CALIBRATION

SchemeName = Literal[
    "none",
    "int8",
    "int6",
    "int4",
    "int4-g64",
    "int4-g128",
    "int8-token",
    "int4-token",
    "q8_0",
    "q4_0",
    "q4_1",
    "fp8",
    "fp8-tensor",
    "fp8-block",
    "adopt",
    "int8-weights",
    "int6-weights",
    "int4-weights",
    "int4-g64-weights",
    "int4-g128-weights",
    "q8_0-weights",
    "q4_0-weights",
    "q4_1-weights",
    "fp8-weights",
    "fp8-tensor-weights",
    "fp8-block-weights",
    "adopt-weights",
]


DEFAULT_MAX_KL: Final = 0.25
"""In nats, with 4 bits: the predictions of a model that is further away are of little use."""
HEAD: Final = "lm_head"
"""What rules call the output head."""
_SCALED_UNASKED: Final = ("int8", "int8-token", "int8-weights")
_PATTERN = r"^[^\s=\x00-\x1f\x7f]+$"
"""Of patterns of names, which the options of the pass join by spaces, and by `=` with schemes.

Python separates at more control characters than `\\s` stands for here; no name has any.
"""


def scheme_alone(value: Any) -> Any:
    """A section, or the name of a scheme as one."""
    if isinstance(value, dict) and "default" in value:
        if "scheme" in value:
            raise PydanticCustomError("scheme", "default and scheme are one key: give one of them")
        return {("scheme" if key == "default" else key): given for key, given in value.items()}
    return {"scheme": value} if isinstance(value, str) else value


def _head_choice(value: Any) -> Any:
    return ("auto" if value else "none") if isinstance(value, bool) else value


class RuleSection(Section):
    """The scheme of the matrices whose names match a pattern."""

    match: str = Field(
        min_length=1,
        pattern=_PATTERN,
        description="Name of a matrix, as `infc inspect` shows it, with or without `.weight`; `*`"
        f" stands for any text, and `{HEAD}` for the output head.",
    )
    scheme: SchemeName = Field(description="Scheme of these matrices.")


class CalibrationSection(Section):
    """What a calibrated method of quantization looks at."""

    text: str = key(
        CALIBRATION,
        "A file of text, or of JSON lines with `text` or `messages`, relative to this file; or a"
        " text that is part of infc: general-calibration.",
        min_length=1,
    )
    tokens: CountOrAuto = key(
        None,
        "How much of the text is used; auto is 8192, 3072 for models of more than about 300 M"
        " parameters, and 2048 for very large ones.",
        unit="tokens",
        ge=64,
        le=1 << 20,
    )


class QuantizationSection(Section):
    """In how many bits matrices are held; a scheme's name alone stands for its section."""

    scheme: SchemeName = key(
        "none",
        "int8: int8 weights and int8 activations in groups of 32 with a scale each; int6 and"
        " int4: the same with 6-bit and 4-bit weights; int4-g64 and int4-g128: int4 with weights"
        " in groups of 64 and 128, which is smaller and less accurate; int8-token and"
        " int4-token: activations with one scale per token and exact integer sums, which is"
        " faster and less accurate; q8_0, q4_0, q4_1: the formats of GGUF; fp8: weights and"
        " activations in e4m3, with one scale per output channel and per token; fp8-tensor: the"
        " same with one scale per matrix; fp8-block: one scale for each 128x128 weights and each"
        " 128 activations; adopt: matrices that a GGUF file holds in one of its formats above"
        " are kept as they are, and those that it holds in others become int8. With -weights at"
        " the end, the weights are the same and activations stay in floating point, which is"
        " slower. `default` is another name of this key.",
    )
    rules: list[RuleSection] = key(
        [], "Schemes of single matrices: the first rule whose pattern matches a name is used."
    )
    skip: list[Annotated[str, Field(pattern=_PATTERN)]] = key(
        [],
        "Names of matrices that are not quantized, whatever the rules say; `*` stands for any"
        " text.",
        unit="patterns",
    )
    head: Annotated[Literal["auto", SchemeName], BeforeValidator(_head_choice)] = key(
        "auto",
        "Scheme of the output head, which computes the logits; if `scheme` has 4 bits, auto is int6"
        " where the backend has kernels for it, and else int8 (with -weights or -token if"
        " activations are like that); otherwise it is `scheme`."
        " true means auto, false means none.",
    )
    attention: Annotated[Literal["auto", SchemeName], BeforeValidator(_head_choice)] = key(
        "auto",
        "Scheme of the matrices that make queries, keys and values, and of those that read the"
        " result of attention. auto is `scheme` if that has 8 bits; beside 4 bits, it is the scheme"
        " with 8 bits for all of them but queries, and what a table of embeddings that is not the"
        " output head saves with 4 bits is spent on 8 bits for queries and down projections, if it"
        " is enough for all of them. true means auto, false means none.",
    )
    embedding: Annotated[Literal["auto", SchemeName], BeforeValidator(_head_choice)] = key(
        "auto",
        "Scheme of the table of token embeddings; auto is that of the output head if both are the"
        " same matrix, which is then stored once, and otherwise `scheme` if it has fewer than 8"
        " bits or is fp8, else int8. true means auto, false means none.",
    )
    method: Literal["auto", "nearest", "gptq"] = key(
        AUTO,
        "gptq: error feedback, so that later weights of a row make up for the errors of earlier"
        " ones on the calibration text, which takes minutes; nearest: each weight is rounded by"
        " itself, which takes seconds and is less accurate; auto is gptq, but nearest for `adopt`,"
        " for models without a tokenizer, and for very large ones.",
    )
    channel_scaling: Literal["auto", "none", "smoothquant", "awq"] = key(
        AUTO,
        "Before they are rounded, columns of matrices are multiplied by scales, and what they"
        " multiply is divided by them. awq: the scales with the smallest error of the products;"
        " smoothquant: scales by the largest activations and weights alone, without a search."
        " Chosen on the calibration text. auto is awq if `scheme` is int8, int8-token or"
        " int8-weights and weights are calibrated anyway: with 4 bits, error feedback gains as much"
        " alone.",
    )
    calibration: CalibrationSection = Field(
        default=CalibrationSection(), description="The calibration of methods that need one."
    )

    @model_validator(mode="after")
    def _choose_head_once(self) -> Self:
        """A rule for the head would silently win."""
        if self.head != AUTO and any(
            rule.match.removesuffix(".weight") == HEAD for rule in self.rules
        ):
            raise PydanticCustomError(
                "head", f"head and a rule for {HEAD} choose the same scheme: give one of them"
            )
        return self

    @property
    def is_used(self) -> bool:
        """Whether any matrix may be quantized."""
        return is_quantizing(*self.schemes)

    @property
    def head_scheme(self) -> str:
        """The scheme of the head; empty if it is that of the other matrices."""
        is_open = self.head == AUTO and not has_four_bits(self.scheme)
        return "" if is_open else self.head

    @property
    def attention_scheme(self) -> str:
        """The scheme of the matrices of attention; empty if it is that of the other matrices."""
        is_open = self.attention == AUTO and not has_four_bits(self.scheme)
        return "" if is_open else self.attention

    @property
    def is_calibrated(self) -> bool:
        """Whether a calibration text is looked at, if that is possible."""
        if not self.is_used:
            return False
        is_open = self.rounding_method == AUTO
        return is_open or (self.must_calibrate and not self.ignores_calibration)

    @property
    def scaling_method(self) -> str:
        """How channels are scaled, if there is a calibration text."""
        if self.channel_scaling != AUTO:
            return self.channel_scaling
        return AUTO if self.method != "nearest" and self.scheme in _SCALED_UNASKED else "none"

    @property
    def rounding_method(self) -> str:
        """How weights are rounded, if there is a calibration text."""
        is_open = self.method == AUTO and "calibration" not in self.model_fields_set
        return "nearest" if is_open and self.scheme in ADOPTING else self.method

    @property
    def must_calibrate(self) -> bool:
        """Whether it is an error if the weights cannot be calibrated."""
        chosen = self.method == "gptq" or self.channel_scaling not in (AUTO, "none")
        return chosen or "calibration" in self.model_fields_set

    @property
    def default_max_kl(self) -> float | None:
        """The bound of the KL divergence where the recipe has none; nearest is a choice of one."""
        return DEFAULT_MAX_KL if self.method != "nearest" and self.has_four_bits else None

    @property
    def has_four_bits(self) -> bool:
        """Whether any matrix may be held in 4 bits."""
        return any(map(has_four_bits, self.schemes))

    @property
    def schemes(self) -> set[str]:
        """Every scheme that is named, auto and none included."""
        rules = (rule.scheme for rule in self.rules)
        return {self.scheme, self.head, self.attention, self.embedding, *rules}

    @property
    def ignores_calibration(self) -> bool:
        """Whether a calibration is given, and nothing needs one."""
        needs_none = self.method == "nearest" and self.channel_scaling in (AUTO, "none")
        return needs_none and "calibration" in self.model_fields_set
