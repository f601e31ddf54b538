"""Tokens of the IR's text form, each with its line and column."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .errors import ParseError

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
"""What may follow `%` or `@`, or stand as a resource's name, without spaces."""


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
