"""Incremental detokenization: text appears while ids are still being sampled, and ends before a stop text.

A character may be spelled by several byte pieces, and a stop text by several tokens. So text is held back while it
could still be half a character or the beginning of a stop text; each token is looked at once.
"""

import codecs
import re
from collections import deque
from collections.abc import Iterable, Sequence

from nanollm.text.tokenizer import Tokenizer

NOT_UTF8 = re.compile("[\udc80-\udcff]")  # what the surrogateescape handler makes of a byte that is in no character


class TextStream:
    """Ids one by one become text that never ends in half a character or in what may turn out to be a stop text.

    All that `push` and `close` return, joined, is `tokenizer.decode_drawn` of the ids, cut at the first stop text.
    Of stop texts that overlap, the first is the one that begins first: until that is known, neither has been found.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
        check_stops(stops)
        self.text = ""
        """All that was handed out so far."""
        self.is_stopped = False
        """A stop text was found; it and all after it is cut."""
        self.begins: list[int] = []
        """Where in the text, in characters, each id begins that was pushed: at the character of its first byte. An id
        follows when that character is certain, or at the end; behind a stop text nothing is certain any more."""
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._longest = max(map(len, stops), default=0)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._held = ""  # after each push: the proper beginning of a stop text, or nothing
        self._unplaced: deque[int] = deque()  # bytes before each id that is not in `begins` yet
        self._bytes = 0  # of all ids
        self._decoded_bytes = self._decoded_characters = 0  # of these, what has become text, handed out or held

    def push(self, token: int) -> str:
        """The text that is certain now that this id was drawn; often none."""
        self._unplaced.append(self._bytes)
        if token >= self._tokenizer.vocab_size:
            return ""  # says nothing, not even that a character has ended
        return self._release(self._decode(token), is_last=False)

    def stops_at(self, token: int) -> bool:
        """Push an id for a caller that only asks whether the text is over with it, as a row of the engine does."""
        self.push(token)
        return self.is_stopped

    def read(self, ids: Iterable[int]) -> str:
        """The text of ids that are all there is, up to the first stop text."""
        return "".join(map(self.push, ids)) + self.close()

    def close(self) -> str:
        """The rest of the text, when no more ids come. Bytes that are not UTF-8 become U+FFFD."""
        return self._release(self._utf8.decode(b"", final=True), is_last=True)

    def _decode(self, token: int) -> str:
        spelled = self._tokenizer.bytes_of(token)
        self._bytes += len(spelled)
        if self._tokenizer.is_byte(token):
            return self._utf8.decode(spelled)
        # Only byte pieces in a row can spell a character; SentencePiece gives up at anything else, marks included.
        return self._utf8.decode(b"", final=True) + spelled.decode()

    def _release(self, text: str, *, is_last: bool) -> str:
        if self.is_stopped:
            return ""
        self._place(text, is_last=is_last)
        held = self._held + NOT_UTF8.sub("\ufffd", text)
        found = min((place for stop in self._stops if (place := held.find(stop)) >= 0), default=len(held))
        certain = found if is_last else min(found, self._first_open(held))
        self.is_stopped = certain == found < len(held)
        self._held = "" if is_last or self.is_stopped else held[certain:]
        self.text += held[:certain]
        return held[:certain]

    def _place(self, text: str, *, is_last: bool) -> None:
        """Note which ids begin in this text. Each byte that is in no character is one of its own in it."""
        for character in text:
            self._decoded_bytes += len(character.encode("utf-8", "surrogateescape"))
            while self._unplaced and self._unplaced[0] < self._decoded_bytes:
                self._unplaced.popleft()
                self.begins.append(self._decoded_characters)
            self._decoded_characters += 1
        if is_last:
            self.begins += [self._decoded_characters] * len(self._unplaced)
            self._unplaced.clear()

    def _first_open(self, held: str) -> int:
        """Where a stop text may have begun that the next tokens decide on; the length if nowhere."""
        places = range(max(0, len(held) - self._longest + 1), len(held))
        return next(
            (place for place in places if any(stop.startswith(held[place:]) for stop in self._stops)), len(held)
        )


def check_stops(stops: Sequence[str]) -> None:
    """Refuse a stop text that would end every text before it begins."""
    if "" in stops:
        raise ValueError("a stop text needs at least one character, got an empty one; leave it out")
