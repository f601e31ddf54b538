"""`infc.runtime.text.tokenizer` under its earlier name, for scripts written with it."""

from .text.tokenizer import Tokenizer

__all__ = ["Tokenizer"]
