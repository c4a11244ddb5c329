"""How do the tokens of one reply become its text, and what is said of each token?

A token is spoken of once some of its text is out, so that what a stop text cuts off is never mentioned.
"""

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

from nanollm.generate.request import Scored
from nanollm.serve.worker import News
from nanollm.text.stream import TextStream
from nanollm.text.tokenizer import Tokenizer

FinishReason = Literal["stop", "length"]
LEAST_LOGPROB = -9999.0
"""JSON has no minus infinity."""


class Speller:
    """The name and the bytes of each id, as a client should see them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._names = tokenizer.symbols
        self.spell = cache(self._spell)

    def _spell(self, token: int) -> tuple[str, bytes]:
        """No two ids share a name. A mark has no bytes; a part of a character is named by its byte."""
        spelled = self.tokenizer.bytes_of(token)
        if token in self._names or token >= self.tokenizer.vocab_size:
            return self._names.get(token, f"<{token}>"), b""
        if not self.tokenizer.is_byte(token):
            return spelled.decode(), spelled
        # Where a learned piece spells the same character, the byte piece is named by its byte, too.
        is_character = spelled.isascii() and self.tokenizer.encode(spelled.decode()) == [token]
        return spelled.decode() if is_character else f"bytes:\\x{spelled[0]:02x}", spelled


@dataclass(frozen=True)
class Entry:
    """A token of a reply and how the model saw it."""

    token: int
    scored: Scored
    offset: int
    """Where in the reply it begins, in characters."""

    @property
    def logprob(self) -> float:
        return max(self.scored.logprob, LEAST_LOGPROB)

    @property
    def top(self) -> list[tuple[int, float]]:
        return [(token, max(logprob, LEAST_LOGPROB)) for token, logprob in self.scored.top]


@dataclass
class Part:
    """What is new of a choice."""

    index: int
    text: str = ""
    entries: list[Entry] = field(default_factory=list)
    finish: FinishReason | None = None


class Choice:
    """One reply, from its first token to its last."""

    def __init__(self, index: int, speller: Speller, stops: Sequence[str]) -> None:
        self.index = index
        self.tokens = 0
        """Tokens drawn, an end token among them not counted."""
        self._speller = speller
        self._text = TextStream(speller.tokenizer, stops)
        self._untold: deque[News] = deque()
        self._told = 0

    def take(self, news: Sequence[News]) -> Part:
        """What these tokens add to the text, and which tokens may be spoken of now."""
        part = Part(self.index)
        for one in news:
            if one.finish != "end":
                self._take_token(one, part)
            if one.finish is not None:
                part.text += self._text.close()
                part.finish = "length" if one.finish == "length" and not self._text.is_stopped else "stop"
        part.entries = self._tell(everything=part.finish is not None and not self._text.is_stopped)
        return part

    def _take_token(self, one: News, part: Part) -> None:
        self.tokens += 1
        self._untold.append(one)
        part.text += self._text.push(one.token)

    def _tell(self, *, everything: bool) -> list[Entry]:
        """Of the tokens that were not told yet, those that begin in the text that is out, or all."""
        begins = self._text.begins
        end = len(begins) if everything else bisect_left(begins, len(self._text.text), self._told)
        untold = [(self._untold.popleft(), begin) for begin in begins[self._told : end]]
        self._told = end
        return [Entry(one.token, one.scored, begin) for one, begin in untold if one.scored is not None]
