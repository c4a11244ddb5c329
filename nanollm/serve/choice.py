"""How do the tokens of one reply become its text, and what is said of each token?

A token is spoken of once some of its text is out, so that what a stop text cuts off is never mentioned.
"""

import codecs
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

from nanollm.generate.request import Scored
from nanollm.serve.worker import News
from nanollm.text.stream import TextStream
from nanollm.text.tokenizer import BOS_ID, EOS_ID, MARKS, PAD_ID, UNK_ID, Tokenizer

FinishReason = Literal["stop", "length"]
LEAST_LOGPROB = -9999.0
"""JSON has no minus infinity."""


class Speller:
    """The name and the bytes of each id, as a client should see them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        special = {PAD_ID: "<pad>", UNK_ID: "<unk>", BOS_ID: "<s>", EOS_ID: "</s>"}
        self._names = special | {tokenizer.mark_id(mark): mark for mark in MARKS}
        self.spell = cache(self._spell)

    def _spell(self, token: int) -> tuple[str, bytes]:
        """A mark has a name and no bytes; a part of a character is named by its bytes."""
        spelled = self.tokenizer.bytes_of(token)
        if token in self._names or token >= self.tokenizer.vocab_size:
            return self._names.get(token, f"<{token}>"), b""
        try:
            return spelled.decode(), spelled
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled), spelled


@dataclass(frozen=True)
class Entry:
    """A token of a reply and how the model saw it."""

    token: int
    scored: Scored
    offset: int
    """Characters of the reply before it."""

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
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._drawn_characters = 0
        self._untold: deque[Entry] = deque()

    def take(self, news: Sequence[News]) -> Part:
        """What these tokens add to the text, and which tokens may be spoken of now."""
        part = Part(self.index)
        for one in news:
            if one.finish != "end":
                self._take_token(one, part)
            if one.finish is not None:
                part.text += self._text.close()
                part.finish = "length" if one.finish == "length" and not self._text.is_stopped else "stop"
        everything = part.finish is not None and not self._text.is_stopped
        while self._untold and (everything or self._untold[0].offset < len(self._text.text)):
            part.entries.append(self._untold.popleft())
        return part

    def _take_token(self, one: News, part: Part) -> None:
        self.tokens += 1
        if one.scored is not None:
            self._untold.append(Entry(one.token, one.scored, self._drawn_characters))
            self._drawn_characters += len(self._utf8.decode(self._speller.spell(one.token)[1]))
        part.text += self._text.push(one.token)
