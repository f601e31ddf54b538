"""Tokens of the IR's text form, each with its line and column."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn, TypeVar

from .errors import ParseError

_T = TypeVar("_T")
_KINDS = {
    "end": "the end",
    "integer": "an integer",
    "mark": "a mark",
    "name": "a name",
    "string": "a string in quotes",
    "word": "a word",
}
_MAX_DEPTH = 100
"""Nesting of tuples and weight expressions beyond which text is refused, not recursed into."""

_TOKEN = re.compile(
    r"""(?P<space>[ \t\r\n]+|\#[^\n]*|//[^\n]*)
      | (?P<string>"(?:[^"\\\n]|\\.)*")
      | (?P<number>-?(?:\d+\.\d*(?:[eE][+-]?\d+)?|\d+[eE][+-]?\d+|(?:inf|nan)\b))
      | (?P<word>[A-Za-z_][A-Za-z0-9_]*)
      | (?P<integer>-?\d+)
      | (?P<mark>\.\.|[%@{}()\[\],:=+*.\-])
    """,
    re.VERBOSE,
)

_RANGE = re.compile(r"(-?\d+)(?=\.\.)")

_NAME = re.compile(r'[A-Za-z0-9_]+(?:[.\-][A-Za-z0-9_]+)*|"(?:[^"\\\n]|\\.)*"')
"""What may follow `%` or `@`, without a space between."""


@dataclass(frozen=True, slots=True)
class Token:
    """`kind` is string, number (a float), word, integer, mark, name (after % or @) or end."""

    kind: str
    text: str
    offset: int


class Lexer:
    """All tokens of a text; errors carry the place where they happened."""

    def __init__(self, text: str, source: str) -> None:
        self.text = text
        self.source = source
        self.tokens = self._scan()

    def error(self, message: str, offset: int) -> ParseError:
        """A ParseError at a place of the text, given by its offset in characters."""
        line = self.text.count("\n", 0, offset) + 1
        column = offset - (self.text.rfind("\n", 0, offset) + 1) + 1
        return ParseError(message, line=line, column=column, source=self.source)

    def _scan(self) -> list[Token]:
        tokens: list[Token] = []
        at = 0
        while at < len(self.text):
            if tokens and tokens[-1].text in ("%", "@") and tokens[-1].offset == at - 1:
                token = self._name(at)
            else:
                token = self._token(at)
            if token.kind != "space":
                tokens.append(token)
            at += len(token.text)
        tokens.append(Token("end", "", len(self.text)))
        return tokens

    def _name(self, at: int) -> Token:
        match = _NAME.match(self.text, at)
        if match is None:
            raise self.error(f"expected a name after {self.text[at - 1]!r}", at)
        return Token("name", match.group(), at)

    def _token(self, at: int) -> Token:
        match = _RANGE.match(self.text, at)
        if match is not None:
            return Token("integer", match.group(), at)
        match = _TOKEN.match(self.text, at)
        if match is None or match.lastgroup is None:
            if self.text[at] == '"':
                raise self.error("unterminated string", at)
            raise self.error(f"unexpected character {self.text[at]!r}", at)
        return Token(match.lastgroup, match.group(), at)


class TokenReader:
    """Reads tokens one after the other: what every rule of the grammar is made of."""

    def __init__(self, lexer: Lexer) -> None:
        self.lexer = lexer
        self.at = 0
        self.depth = 0

    @property
    def token(self) -> Token:
        """The next token."""
        return self.lexer.tokens[self.at]

    def fail(self, message: str, token: Token | None = None) -> NoReturn:
        """Raise a ParseError at a token, the next one where none is given."""
        raise self.lexer.error(message, (token or self.token).offset)

    def take(self) -> Token:
        """The next token, which is then behind us; the end is never passed."""
        token = self.token
        if token.kind != "end":
            self.at += 1
        return token

    def accept(self, text: str) -> bool:
        """Take the next token if it is this mark or word."""
        if self.token.text == text and self.token.kind in ("mark", "word"):
            self.at += 1
            return True
        return False

    def expect(self, kind: str, text: str | None = None) -> Token:
        """Take the next token, which must be of this kind (and text)."""
        token = self.token
        if token.kind != kind or (text is not None and token.text != text):
            found = repr(token.text) if token.text else "the end of the text"
            self.fail(f"expected {repr(text) if text else _KINDS[kind]}, found {found}")
        return self.take()

    def mark(self, text: str) -> Token:
        """Take the next token, which must be this mark."""
        return self.expect("mark", text)

    def string(self, token: Token) -> str:
        """The text that a string token spells."""
        try:
            value = json.loads(token.text)
        except ValueError:
            self.fail("malformed string", token)
        assert isinstance(value, str)
        return value

    def integer(self) -> int:
        """Take an integer."""
        token = self.expect("integer")
        try:
            return int(token.text)
        except ValueError:  # CPython refuses to convert thousands of digits.
            self.fail("the number is too long", token)

    def nested(self, parse: Callable[[], _T]) -> _T:
        """`parse()`, one level deeper; fails beyond the deepest allowed level."""
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            self.fail("nested too deeply")
        result = parse()
        self.depth -= 1
        return result

    def listing(self, close: str, parse: Callable[[], _T]) -> list[_T]:
        """Items separated by commas up to and with the closing mark; a last comma is allowed."""
        items: list[_T] = []
        while not self.accept(close):
            items.append(parse())
            if not self.accept(","):
                self.mark(close)
                break
        return items
