"""How much longer a tokenizer makes a text, so that a short one cannot take all memory."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from ...ir.errors import ArtifactError

if TYPE_CHECKING:
    import tokenizers

_MAX_GROWTH: Final = 1 << 12
_MAX_CHARACTERS: Final = 1 << 28  # of a text as the normalizer leaves it

# Characters that one becomes at most: U+FDFA is 18 in the compatibility forms.
_FACTORS: Final = {
    "BertNormalizer": 12.0,
    "ByteLevel": 4.0,
    "Lowercase": 3.0,
    "NFC": 3.0,
    "NFD": 4.0,
    "NFKC": 18.0,
    "NFKD": 18.0,
    "Precompiled": 18.0,
}


def max_text_characters(backend: tokenizers.Tokenizer) -> int:
    """Characters that a text may have to be tokenized.

    The library ends the process when memory is gone, and a few replacements in `tokenizer.json`,
    each of which doubles what the last one made, take it all for a single character. Raises
    ArtifactError for a tokenizer like that.
    """
    growth = max(_growth(backend.normalizer), _growth(backend.decoder))
    if growth > _MAX_GROWTH:
        raise ArtifactError(
            f"its replacements turn one character into up to {growth:.0g}",
            where="tokenizer/tokenizer.json",
            hint="no text can be tokenized safely; use another tokenizer",
        )
    return int(_MAX_CHARACTERS / growth)


def _growth(component: Any) -> float:
    return 1.0 if component is None else _factor(json.loads(component.__getstate__()))


def _factor(step: Mapping[str, Any]) -> float:
    kind = step.get("type", "")
    if kind == "Sequence":
        return math.prod(
            _factor(one) for key in ("normalizers", "decoders") for one in step.get(key, ())
        )
    if kind == "Replace":
        length, pattern = len(step["content"]), step["pattern"]
        if (text := pattern.get("String")) is not None:
            return max(1.0, length / len(text)) if text else 1.0 + length
        return 1.0 + length  # an expression may match between all characters
    if kind == "Prepend":  # before each stretch between added tokens
        return 1.0 + len(step["prepend"])
    return _FACTORS.get(kind, 1.0)
