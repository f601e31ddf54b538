"""The one way into the tokenizer library: whatever it makes of a text is that request's alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...ir.errors import RequestError

if TYPE_CHECKING:
    import tokenizers


def encode_texts(
    backend: tokenizers.Tokenizer,
    texts: Sequence[str],
    *,
    field: str,
    add_special_tokens: bool = False,
    offsets: bool = False,
) -> list[tokenizers.Encoding]:
    """The encodings of texts, with the characters of each token where `offsets` are wanted.

    As a batch, also of one: `encode` holds the interpreter's lock for as long as it takes.
    RequestError, naming `field`, for what cannot be encoded.
    """
    encode = backend.encode_batch if offsets else backend.encode_batch_fast
    try:
        return encode(list(texts), add_special_tokens=add_special_tokens)
    except (UnicodeEncodeError, TypeError):
        # A lone surrogate: no bytes stand for it.
        raise RequestError(f"the {field} is not valid Unicode text", field=field) from None
    except BaseException as error:
        # A panic of the library is no Exception, and harms nothing beyond this call.
        if type(error).__module__ != "pyo3_runtime":
            raise
        raise RequestError(f"the tokenizer fails on the {field}", field=field) from None
