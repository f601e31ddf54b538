"""Tokens to text as they come: whole characters only, and nothing that may be a stop string."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from .text_decoders import TextDecoder


class StopMatcher:
    """Cuts a stream of text at the first stop string, wherever its pieces begin and end.

    The stop string that is complete first wins, and of those complete at once the longest, so
    the result does not depend on how the text was split.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(sorted(stops, key=len, reverse=True))
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """The text that can no longer become part of a stop string."""
        if not self._stops:
            return text
        known = len(self._held)
        self._held += text
        end = self._first_end(known)
        if end is not None:
            result, self._held = self._held[: end - len(self.matched or "")], ""
            return result
        keep = self._longest_prefix()
        cut = len(self._held) - keep
        result, self._held = self._held[:cut], self._held[cut:]
        return result

    def flush(self) -> str:
        """What was held back, now that nothing follows."""
        result, self._held = self._held, ""
        return result

    def _first_end(self, known: int) -> int | None:
        """Where the first complete stop string ends; sets `matched`."""
        best: int | None = None
        for stop in self._stops:
            found = self._held.find(stop, max(0, known - len(stop) + 1))
            end = found + len(stop)
            if found >= 0 and (best is None or end < best):
                best, self.matched = end, stop
        return best

    def _longest_prefix(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = min(len(self._held), len(self._stops[0]) - 1)
        for length in range(longest, 0, -1):
            end = self._held[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0


class Detokenizer:
    """The text of one request. `matched_stop` is the stop string that ended it, if one did.

    The text of the first `min_tokens` tokens is never part of a stop string.
    """

    def __init__(
        self, decoder: TextDecoder, stops: Sequence[str] = (), min_tokens: int = 0
    ) -> None:
        self._decoder = decoder
        self._stops = StopMatcher(stops)
        self._num_free = min_tokens
        self.num_characters = 0
        """Of all text that was decoded, also what is held back or behind a stop string."""

    @property
    def matched_stop(self) -> str | None:
        """The stop string that was found; nothing may be pushed after it."""
        return self._stops.matched

    def push(self, token_id: int) -> str:
        """The text that is certain now."""
        text = self._decoder.push(token_id)
        self.num_characters += len(text)
        if self._num_free > 0:
            self._num_free -= 1
            return text
        return self._stops.push(text)

    def flush(self) -> str:
        """The rest at the end of the request, unless a stop string ended it."""
        if self._stops.matched is not None:
            return ""
        text = self._stops.push(self._decoder.flush())
        return text if self._stops.matched is not None else text + self._stops.flush()

    def fork(self) -> Detokenizer:
        """Another for another answer to the same prompt; nothing may have been pushed yet."""
        twin = copy.copy(self)
        twin._decoder, twin._stops = self._decoder.fork(), copy.copy(self._stops)
        return twin
