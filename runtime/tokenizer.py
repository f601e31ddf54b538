"""Text to tokens and back with the `tokenizers` library alone, and chats to text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from ..ir.artifact import Artifact
from ..ir.errors import ArtifactError, RequestError
from .control_tokens import ControlTokens
from .text_decoders import TextDecoder, texts_of

if TYPE_CHECKING:
    import tokenizers

    from .chat_template import ChatTemplate, Message


class RenderOptions(TypedDict, total=False):
    """What a chat template may be told; `ChatTemplate.render` says what each does."""

    add_generation_prompt: bool
    continue_final_message: bool
    tools: Sequence[Mapping[str, Any]] | None
    variables: Mapping[str, Any] | None


class Tokenizer:
    """The tokenizer of an artifact. `eos_token_ids` are the ids that end a text."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_token_id: int | None = None,
        eos_token_ids: tuple[int, ...] = (),
        chat_template: str | None = None,
    ) -> None:
        # Serving decides on lengths: what the file says on padding and truncation is for training.
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.bos_token_id = bos_token_id
        self.eos_token_ids = eos_token_ids
        self.special_ids = frozenset(
            index for index, token in backend.get_added_tokens_decoder().items() if token.special
        )
        self._control_tokens = _control_tokens(backend)
        self._texts = texts_of(backend)
        self._template_source = chat_template
        self._template: ChatTemplate | None = None

    @classmethod
    def load(cls, artifact: Artifact) -> Tokenizer | None:
        """The tokenizer of the artifact; None for one that takes and gives token ids only."""
        files = artifact.manifest.tokenizer
        if files is None:
            return None
        from tokenizers import Tokenizer as Backend

        path = artifact.path / files.file
        text = artifact.read_text(files.file)
        try:
            backend = Backend.from_str(text)
        except Exception as error:  # the library raises plain Exception for whatever is wrong
            raise ArtifactError(f"the tokenizer cannot be read: {error}", where=str(path)) from None
        template = None
        if files.chat_template is not None:
            template = artifact.read_text(files.chat_template)
        return cls(backend, bos_token_id=files.bos, eos_token_ids=files.eos, chat_template=template)

    @property
    def has_chat_template(self) -> bool:
        """Whether `render_chat` can work."""
        return self._template_source is not None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The tokens of a text, with those that begin it unless told otherwise."""
        try:
            # As a batch of one: `encode` holds the interpreter's lock for as long as it takes.
            encoded = self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
            ids: list[int] = encoded[0].ids
        except (UnicodeEncodeError, TypeError):
            # A lone surrogate: no bytes stand for it.
            raise RequestError("the prompt is not valid Unicode text", field="prompt") from None
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of the tokens."""
        text: str = self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def text_parts(self, token_ids: Sequence[int]) -> list[str]:
        """What each token of a prompt adds to its text, special tokens too: whole characters.

        What an unfinished character at the end becomes, the answer has.
        """
        return list(map(self.stream_decoder(skip_special_tokens=False, context=()).push, token_ids))

    def stream_decoder(self, *, skip_special_tokens: bool, context: Sequence[int]) -> TextDecoder:
        """Turns the tokens that follow `context` (a prompt, or its end) into text one by one."""
        skipped = self.special_ids if skip_special_tokens else frozenset[int]()
        return self._texts.open(skipped, context)

    def chat_pieces(
        self, messages: Sequence[Message], **options: Unpack[RenderOptions]
    ) -> list[str]:
        """The text of a conversation, cut wherever a message spells a control token.

        The pieces tokenize apart, so that the template alone writes control tokens. Raises
        RequestError for a model without a template, and where the template refuses.
        """
        if self._template_source is None:
            raise RequestError(
                "this model has no chat template",
                field="messages",
                hint="write the prompt yourself, as text or token ids",
            )
        if self._template is None:
            from .chat_template import ChatTemplate  # jinja2 is slow to import

            self._template = ChatTemplate(self._template_source, self._constants())
        if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
            return [self._template.render(messages, **options)]  # which refuses it
        marked = self._control_tokens.mark(messages)
        return self._control_tokens.pieces(self._template.render(marked, **options))

    def render_chat(self, messages: Sequence[Message], **options: Unpack[RenderOptions]) -> str:
        """The text of a conversation, special tokens written out; raises as `chat_pieces`."""
        return "".join(self.chat_pieces(messages, **options))

    def encode_pieces(self, pieces: Sequence[str]) -> list[int]:
        """The tokens of what `chat_pieces` gave."""
        return [id for piece in pieces for id in self.encode(piece, add_special_tokens=False)]

    def encode_chat(
        self, messages: Sequence[Message], **options: Unpack[RenderOptions]
    ) -> list[int]:
        """The tokens of a conversation; the template writes every special token itself."""
        return self.encode_pieces(self.chat_pieces(messages, **options))

    def _constants(self) -> dict[str, str]:
        eos = self.eos_token_ids[0] if self.eos_token_ids else None
        ids = {"bos_token": self.bos_token_id, "eos_token": eos}
        texts = {name: self.backend.id_to_token(i) for name, i in ids.items() if i is not None}
        return {name: text for name, text in texts.items() if text is not None}


def _control_tokens(backend: tokenizers.Tokenizer) -> ControlTokens:
    special = [token for token in backend.get_added_tokens_decoder().values() if token.special]
    normalize = None
    if backend.normalizer is not None and any(token.normalized for token in special):
        normalize = backend.normalizer.normalize_str
    return ControlTokens((token.content for token in special), normalize)
