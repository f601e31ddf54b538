"""Text to tokens and back with the `tokenizers` library alone, and chats to text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict, Unpack, cast

from ...ir.artifact import Artifact
from ...ir.errors import ArtifactError, RequestError
from .control_tokens import ControlTokens
from .encoding import encode_texts
from .template_text import plain
from .text_decoders import TextDecoder, texts_of
from .tokenizer_growth import max_text_characters

if TYPE_CHECKING:
    from pathlib import Path

    import tokenizers

    from ...ir.manifest import TokenizerFiles
    from .chat_messages import Message
    from .chat_template import ChatTemplate


class RenderOptions(TypedDict, total=False):
    """What a chat template may be told; `ChatTemplate.render` says what each does."""

    add_generation_prompt: bool
    continue_final_message: bool
    tools: Sequence[Mapping[str, Any]] | None
    variables: Mapping[str, Any] | None
    max_characters: int | None


class Tokenizer:
    """The tokenizer of an artifact. `eos_token_ids` are the ids that end a text.

    `special_tokens` are what templates may name (`eos_token`), which need not be what ends a text.
    `tool_template` takes the place of `chat_template` in chats with tools.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_token_id: int | None = None,
        eos_token_ids: tuple[int, ...] = (),
        chat_template: str | None = None,
        tool_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        # Serving decides on lengths: what the file says on padding and truncation is for training.
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.bos_token_id = bos_token_id
        self.eos_token_ids = eos_token_ids
        self._max_characters = max_text_characters(backend)
        added = backend.get_added_tokens_decoder()
        self.special_texts = {t.content: i for i, t in added.items() if t.special and t.content}
        self.special_ids = frozenset(index for index, token in added.items() if token.special)
        self._texts = texts_of(backend)
        self._special_tokens = special_tokens
        self._sources = {False: chat_template, True: tool_template or chat_template}
        self._templates: dict[bool, ChatTemplate] = {}
        self._control_tokens: ControlTokens | None = None

    @classmethod
    def load(cls, artifact: Artifact, *, only_decodes: bool = False) -> Tokenizer | None:
        """The tokenizer of the artifact; None for one that takes and gives token ids only.

        With `only_decodes`, it cannot encode, which takes a fraction of the memory.
        """
        files = artifact.manifest.tokenizer
        if files is None:
            return None
        return cls.open(artifact.path, files, artifact.read_text, only_decodes=only_decodes)

    @classmethod
    def open(
        cls,
        directory: Path,
        files: TokenizerFiles,
        read: Callable[[str], str],
        *,
        only_decodes: bool = False,
    ) -> Tokenizer:
        """The tokenizer of `files` in a directory, whose texts `read` gives by name.

        Raises ArtifactError.
        """
        text = read(files.file)
        backend = _decoding(text) if only_decodes else None
        try:
            backend = backend or _whole(text)
        except Exception as error:  # the library raises plain Exception for whatever is wrong
            where = str(directory / files.file)
            raise ArtifactError(f"the tokenizer cannot be read: {error}", where=where) from None
        names = (files.chat_template, files.tool_template)
        texts = [None if name is None else read(name) for name in names]
        return cls(
            backend,
            bos_token_id=files.bos,
            eos_token_ids=files.eos,
            chat_template=texts[0],
            tool_template=texts[1],
            special_tokens=files.special_tokens,
        )

    @property
    def has_chat_template(self) -> bool:
        """Whether `render_chat` can work without tools."""
        return self._sources[False] is not None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The tokens of a text, with those that begin it unless told otherwise."""
        self._check_length(text, "prompt")
        (encoding,) = encode_texts(
            self.backend, [text], field="prompt", add_special_tokens=add_special_tokens
        )
        ids: list[int] = encoding.ids
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

    def render_chat(self, messages: Sequence[Message], **options: Unpack[RenderOptions]) -> str:
        """The text of a conversation, special tokens written out.

        Raises RequestError for a model without a template, and where the template refuses.
        """
        return plain(self._render(messages, options))

    def encode_chat(
        self, messages: Sequence[Message], **options: Unpack[RenderOptions]
    ) -> list[int]:
        """The tokens of a conversation, its control tokens from the template alone. Thread-safe.

        Takes time: of servers it wants a thread, and `max_characters`. Raises as `render_chat`.
        """
        rendered = self._render(messages, options)
        if self._control_tokens is None:
            tools = (False, True) if self.has_chat_template else (True,)
            written = "\0".join(self._template(with_tools=each).written for each in tools)
            self._control_tokens = ControlTokens(self.backend, written)
        self._check_length(rendered, "messages")
        return self._control_tokens.encode(rendered)

    def _render(self, messages: Sequence[Message], options: RenderOptions) -> str:
        template = self._template(with_tools=options.get("tools") is not None)
        return template.render(messages, **options)

    def _template(self, *, with_tools: bool) -> ChatTemplate:
        if (template := self._templates.get(with_tools)) is not None:
            return template
        if (source := self._sources[with_tools]) is None:
            raise RequestError(
                "this model has no chat template",
                field="messages",
                hint="format the prompt yourself, as text or token ids",
            )
        from .chat_template import ChatTemplate  # jinja2 is slow to import

        template = ChatTemplate(source, self._constants())
        for each in (False, True):  # most models have one for both
            if self._sources[each] == source:
                self._templates.setdefault(each, template)
        return self._templates[with_tools]

    def _check_length(self, text: str, field: str) -> None:
        if len(text) > self._max_characters:
            raise RequestError(
                f"a text of {len(text)} characters is too long: this tokenizer accepts at most"
                f" {self._max_characters}",
                field=field,
            )

    def template_problem(self, *, with_tools: bool) -> str | None:
        """What is wrong with a template, if it can never be used."""
        try:
            template = self._template(with_tools=with_tools)
        except ArtifactError as error:
            return error.message
        return "it does too much with the shortest of messages" if template.is_endless else None

    def _constants(self) -> dict[str, str]:
        if self._special_tokens is not None:
            return dict(self._special_tokens)
        # An artifact of an older version: what ends a text is all that is known.
        eos = self.eos_token_ids[0] if self.eos_token_ids else None
        ids = {"bos_token": self.bos_token_id, "eos_token": eos}
        texts = {name: self.backend.id_to_token(i) for name, i in ids.items() if i is not None}
        return {name: text for name, text in texts.items() if text is not None}


def _whole(text: str) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer as Backend

    return Backend.from_str(text)


def _decoding(text: str) -> tokenizers.Tokenizer | None:
    """What stands for the library's where tokens are only decoded."""
    from .decoding import decoding_backend

    return cast("tokenizers.Tokenizer | None", decoding_backend(text))
