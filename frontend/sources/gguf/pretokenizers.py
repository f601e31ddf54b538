r"""How texts are cut into words before merges, by the names that GGUF files have for it.

A file holds the name alone. Each pattern of a row cuts what the one before it left; what a pattern
does not match stays a piece. Where published tokenizers and llama.cpp differ (letters that are
neither in `a-z` nor in `A-Z`), these are llama.cpp's: a GGUF file means what that makes of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

_SUFFIX: Final = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_SPACES: Final = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_ASCII_PUNCTUATION: Final = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"""


def _words(numbers: str) -> str:
    """The words of Llama 3 and its like, with their own idea of numbers."""
    symbols = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
    return rf"{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{numbers}|{symbols}|{_SPACES}"


def _cased(suffix: str, numbers: str) -> str:
    """Words that end where small letters are followed by capitals."""
    start = r"[^\r\n\p{L}\p{N}]?"
    capital, small = r"((?=[\p{L}])([^a-z]))", r"((?=[\p{L}])([^A-Z]))"
    words = rf"{start}{capital}*{small}+{suffix}|{start}{capital}+{small}*{suffix}"
    return rf"{words}|{numbers}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """Patterns, applied one after the other. `whole`: a word that is a token needs no merges.

    `begins`: texts begin with the model's first token unless the file says otherwise.
    """

    patterns: tuple[str, ...]
    whole: bool = False
    begins: bool = False


_DEFAULT: Final = PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"))
_PLAIN: Final = PreTokenizer((_GPT2,))
_DIGITS: Final = PreTokenizer((r"\p{N}", _GPT2))
_LLAMA3: Final = PreTokenizer((_words(r"\p{N}{1,3}"),), whole=True, begins=True)
_THREES: Final = PreTokenizer((_words(r"\p{N}{1,3}"),))
_QWEN2: Final = PreTokenizer((_words(r"\p{N}"),))
_GPT4O: Final = PreTokenizer((_cased(f"{_SUFFIX}?", r"\p{N}{1,3}"),))
_DEEPSEEK3: Final = PreTokenizer(
    (
        r"\p{N}{1,3}",
        "[一-龥぀-ゟ゠-ヿ]+",
        rf"{_ASCII_PUNCTUATION}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
        rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}",
    )
)
_NAMED: Final = (
    (_DEFAULT, "default"),
    (_PLAIN, "gpt-2 phi-2 gigachat mpt olmo jais trillion granite-docling exaone4 mellum a.x-4.0"),
    (_DIGITS, "starcoder refact command-r smollm codeshell exaone minerva-7b mellum2"),
    (_LLAMA3, "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2"),
    (_THREES, "dbrx smaug-bpe chatglm-bpe"),
    (PreTokenizer(_THREES.patterns, whole=True), "glm4 glm5"),
    (_QWEN2, "qwen2 deepseek-r1-qwen kormo f2llmv2 stablelm2 megrez hunyuan solar-open grok-2"),
    (PreTokenizer((_cased("", r"\p{N}"),), whole=True, begins=True), "tekken"),
    (_GPT4O, "gpt-4o llama4 kanana2 talkie minimax-m2"),
    (_DEEPSEEK3, "deepseek-v3 hunyuan-dense joyai-llm"),
    (
        PreTokenizer(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")),
        "deepseek-coder",
    ),
    (PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")), "falcon"),
)
PRE_TOKENIZERS: Final[Mapping[str, PreTokenizer]] = {
    name: one for one, names in _NAMED for name in names.split()
}
