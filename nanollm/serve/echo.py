"""Completions that begin with their prompt (`echo`), by which evaluations ask how likely texts are.

Letters: T tokens of a prompt, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nanollm.bundle import Bundle
from nanollm.generate.request import TokenLogprobs
from nanollm.serve.protocol import Json
from nanollm.serve.streaming import LogprobEntry, TextFormatter
from nanollm.text.stream import TextStream


@dataclass(frozen=True)
class Echo:
    """A prompt as text, and how likely each of its tokens was behind those before; of the first nothing is known."""

    text: str
    first: int
    entries: list[LogprobEntry]

    @classmethod
    def of(cls, ids: Sequence[int], bundle: Bundle, top: int | None) -> "Echo":
        """Score a prompt by one pass of the model in its compute type; top None: only its text."""
        stream, begins, model = TextStream(bundle.tokenizer), list[int](), bundle.model
        for token in ids:
            begins.append(len(stream.text))
            stream.push(token)
        stream.close()
        if top is None:
            return cls(stream.text, ids[0], [])
        with torch.inference_mode():
            logits = model(torch.tensor([ids], device=model.head.weight.device))[0, :-1]  # (T - 1, V)
            logprobs = logits.float().log_softmax(-1)
            chosen = logprobs.gather(-1, torch.tensor(ids[1:], device=logits.device)[:, None])[:, 0].tolist()
            likely, tokens = (each.tolist() for each in logprobs.topk(top, dim=-1))  # (T - 1, top)
        tops = [list(zip(*pair, strict=True)) for pair in zip(tokens, likely, strict=True)]
        entries = [
            LogprobEntry(token, TokenLogprobs(logprob, best, []), begin)
            for token, logprob, best, begin in zip(ids[1:], chosen, tops, begins[1:], strict=True)
        ]
        return cls(stream.text, ids[0], entries)

    def before(self, choice: Json, formatter: TextFormatter) -> Json:
        """A choice of an answer with the prompt before its text."""
        if choice["logprobs"] is not None:
            told, later = formatter.logprobs(self.entries), choice["logprobs"]
            later["text_offset"] = [len(self.text) + offset for offset in later["text_offset"]]
            first = {"tokens": formatter.detokenizer.spell(self.first)[0], "text_offset": 0}
            choice["logprobs"] = {key: [first.get(key), *told[key], *later[key]] for key in told}
        choice["text"] = self.text + choice["text"]
        return choice
