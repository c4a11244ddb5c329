"""How do requests that come and go become one batch after another?

Every request is waiting, running in a row of the cache, or finished. A step admits waiting requests into free rows,
reads some of their prompts and one token of every row that is replying, all in one pass, and draws the next tokens.
What a row already holds of a prompt is not read again: the samples of a prompt, the turns of a conversation and
requests with the same beginning share it. The engine knows ids only.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from nanollm.generate.request import Completion, Drawn, Request, Scored
from nanollm.generate.runner import Ints, Piece, Runner, TorchRunner, Work
from nanollm.generate.sampling import SamplingConfig, sample, uniforms
from nanollm.model.transformer import Transformer

CHUNK = 512
"""Prompt tokens read in one pass, so that long prompts do not hold up the replies that are running."""

WORTH_WAITING = 16
"""A request waits for another that is about to read at least this many tokens of the same beginning."""


@dataclass
class Row:
    """One place in the cache, and what was last read into it."""

    number: int
    completion: Completion | None = None
    prompt: Ints = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    read: int = 0
    """Tokens of the prompt that the cache holds; they stay usable when the row is free again."""
    newest: int = 0
    """The token drawn last, which the next pass reads."""

    @property
    def is_reading(self) -> bool:
        return self.completion is not None and self.read < len(self.prompt)

    @property
    def is_replying(self) -> bool:
        return self.completion is not None and self.read == len(self.prompt)

    def shares(self, prompt: Ints) -> int:
        """How many tokens of its prompt, read or yet to read, begin this one too."""
        count = min(len(prompt), len(self.prompt))
        differs = self.prompt[:count] != prompt[:count]
        return int(differs.argmax()) if differs.any() else count


class Engine:
    """Runs many requests at once.  Not thread-safe: one thread owns it."""

    def __init__(self, model: Transformer, *, rows: int, length: int | None = None, chunk: int = CHUNK) -> None:
        """Room for `rows` requests at once, of `length` tokens each (None: the model's context)."""
        if rows < 1:
            raise ValueError(f"the engine needs at least one row, got {rows}")
        self.model, self.length = model, length or model.config.context_length
        self.chunk = chunk
        self.rows = [Row(number) for number in range(rows)]
        self.queue: deque[Completion] = deque()
        self.prompt_tokens = self.reused_tokens = self.drawn_tokens = 0
        self.runner: Runner = TorchRunner(model, rows, self.length, chunk)

    @property
    def has_work(self) -> bool:
        return bool(self.queue) or self.running > 0

    @property
    def waiting(self) -> int:
        """Requests that have no row yet."""
        return len(self.queue)

    @property
    def running(self) -> int:
        """Requests that have a row."""
        return sum(row.completion is not None for row in self.rows)

    @property
    def cache_bytes(self) -> int:
        return self.runner.cache_bytes

    def submit(self, request: Request) -> Completion:
        """Queue a request; ValueError if the model cannot continue its prompt."""
        check_prompt(request.prompt, self.length, self.model.config.vocab_size)
        completion = Completion(request)
        self.queue.append(completion)
        return completion

    def cancel(self, completion: Completion) -> None:
        """End a request at once; a finished one stays as it is."""
        if completion.finish is not None:
            return
        completion.finish = "cancelled"
        if completion in self.queue:
            self.queue.remove(completion)
        for row in self.rows:
            if row.completion is completion:
                self._release(row)

    @torch.inference_mode()
    def step(self) -> list[Drawn]:
        """Run one pass; the tokens drawn after it, at most one for each running request."""
        self._admit()
        pieces = list(self._pieces())
        replying = [row for row in self.rows if row.is_replying]
        if not pieces and not replying:
            return []
        positions = [row.read + len(row.completion.ids) - 1 for row in replying if row.completion]
        seen = self.runner.run(
            Work(
                pieces,
                np.array([row.number for row in replying], dtype=np.int64),
                np.array([row.newest for row in replying], dtype=np.int64),
                np.array(positions, dtype=np.int64),
            )
        )
        for piece in pieces:
            self.rows[piece.row].read += len(piece.ids)
        ended = [self.rows[piece.row] for piece in pieces if piece.is_last]
        return self._draw([*ended, *replying], seen.logits, seen.experts)

    # --- schedule ---

    def _admit(self) -> None:
        """Give rows to waiting requests, first come, first served, unless one is worth waiting for."""
        held_back = []
        free = [row for row in self.rows if row.completion is None]
        while self.queue and free:
            completion = self.queue.popleft()
            prompt = np.array(completion.request.prompt, dtype=np.int64)
            shared = [row.shares(prompt) for row in self.rows]
            ready = [min(count, row.read, len(prompt) - 1) for count, row in zip(shared, self.rows, strict=True)]
            coming = [count if row.is_reading else 0 for count, row in zip(shared, self.rows, strict=True)]
            if max(coming) - max(ready) >= WORTH_WAITING:
                held_back.append(completion)
                continue
            source = self.rows[int(np.argmax(ready))]
            row = source if source in free else free[0]
            free.remove(row)
            if row is not source and ready[source.number]:
                self.runner.copy(source.number, row.number, ready[source.number])
            row.completion, row.prompt, row.read = completion, prompt, ready[source.number]
            self.reused_tokens += row.read
        self.queue.extendleft(reversed(held_back))

    def _pieces(self) -> Iterator[Piece]:
        """The next pieces of the prompts that are being read, no more than `chunk` tokens together."""
        room = self.chunk
        for row in self.rows:
            if row.is_reading and room:
                ids = row.prompt[row.read : row.read + room]
                room -= len(ids)
                self.prompt_tokens += len(ids)
                yield Piece(row.number, row.read, ids, row.read + len(ids) == len(row.prompt))

    def _release(self, row: Row) -> None:
        row.completion = None

    # --- postprocess ---

    def _draw(self, rows: list[Row], logits: Tensor, experts: Ints) -> list[Drawn]:
        """One token for each of these rows, from its logits (W, V)."""
        completions = [row.completion for row in rows if row.completion is not None]
        ids, logprobs = sample_each(logits, completions)
        drawn = []
        for index, (row, completion) in enumerate(zip(rows, completions, strict=True)):
            scored = None
            if completion.request.top_logprobs is not None:
                scored = score(logits[index], ids[index], completion.request.top_logprobs, experts[index].tolist())
            completion.logprobs.append(logprobs[index])
            self._take(row, completion, ids[index])
            drawn.append(Drawn(completion, ids[index], scored))
        self.drawn_tokens += len(drawn)
        return drawn

    def _take(self, row: Row, completion: Completion, token: int) -> None:
        """Add a token to a reply, and see whether the reply ends with it."""
        request = completion.request
        row.newest = token
        if token in request.end_ids:
            completion.finish, completion.end_id = "end", token
        else:
            completion.ids.append(token)
            has_room = row.read + len(completion.ids) - 1 < self.length  # the newest token is not in the cache yet
            if request.stop is not None and request.stop(token):
                completion.finish = "stop"
            elif len(completion.logprobs) == request.max_tokens or not has_room:
                completion.finish = "length"
        if completion.finish is not None:
            self._release(row)


def check_prompt(prompt: Sequence[int], limit: int, vocab_size: int) -> None:
    """Refuse what the model cannot continue: an empty prompt, one without room for a reply, ids it does not know."""
    if not len(prompt):
        raise ValueError("expected a prompt of at least one token, got an empty one (a document starts with <s>)")
    if len(prompt) >= limit:
        raise ValueError(
            f"the prompt has {len(prompt):,} tokens, the model's context is {limit:,} and a reply needs at least one; "
            f"shorten the prompt to {limit - 1:,} tokens"
        )
    if not (0 <= min(prompt) and max(prompt) < vocab_size):
        raise ValueError(f"prompt ids must be from 0 to {vocab_size - 1:,}, got {min(prompt)} to {max(prompt)}")


def sample_each(logits: Tensor, completions: Sequence[Completion]) -> tuple[list[int], list[float]]:
    """A token and its log-probability for each row of logits (W, V); rows that choose alike are drawn together."""
    alike: dict[int, list[int]] = {}
    settings: list[SamplingConfig] = []
    for index, completion in enumerate(completions):
        c = completion.request.sampling
        if c not in settings:
            settings.append(c)
        alike.setdefault(settings.index(c), []).append(index)
    ids, logprobs = np.empty(len(completions), dtype=np.int64), np.empty(len(completions), dtype=np.float64)
    for number, indices in alike.items():
        members = [completions[index] for index in indices]
        numbers = uniforms(
            np.array([member.request.seed for member in members]),
            np.array([len(member.logprobs) for member in members]),
        )
        rows = logits if len(indices) == len(logits) else logits[indices]
        device = logits.device
        seen = (torch.tensor([*member.request.prompt, *member.ids], device=device).unique() for member in members)
        drawn, likely = sample(rows, settings[number], numbers, seen)
        ids[indices], logprobs[indices] = drawn.cpu().numpy(), likely.cpu().numpy()
    return ids.tolist(), logprobs.tolist()


def score(logits: Tensor, token: int, top: int, experts: list[list[int]]) -> Scored:
    """How the model saw `token` among its logits (V,)."""
    logprobs = logits.log_softmax(-1)
    likeliest = logprobs.topk(min(top, len(logprobs)))
    pairs = list(zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True))
    return Scored(logprobs[token].item(), pairs, experts)


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    *,
    max_tokens: int,
    end_ids: frozenset[int],
    seed: int = 0,
    stop: Callable[[], Callable[[int], bool]] | None = None,
    samples: int = 1,
) -> list[Completion]:
    """Continue each prompt `samples` times by at most `max_tokens` ids, within the model's context.

    The samples of a prompt stand beside each other. Reply i draws from seed + i alone; `stop` makes the function that
    is told its tokens (see Request.stop).
    """
    if not prompts or not all(prompts):
        raise ValueError("expected at least one prompt and no empty one (a document starts with the <s> token)")
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    repeated = [prompt for prompt in prompts for _ in range(samples)]
    for prompt in prompts:
        check_prompt(prompt, model.config.context_length, model.config.vocab_size)
    length = min(max(map(len, prompts)) + max_tokens, model.config.context_length)
    engine = Engine(model, rows=len(repeated), length=length, chunk=sum(map(len, prompts)))
    completions = [
        engine.submit(
            Request(
                prompt=prompt,
                max_tokens=max_tokens,
                sampling=sampling,
                end_ids=end_ids,
                stop=None if stop is None else stop(),
                seed=seed + number,
            )
        )
        for number, prompt in enumerate(repeated)
    ]
    while engine.has_work:
        engine.step()
    return completions
