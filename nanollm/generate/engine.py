"""How do requests that come and go become one batch after another?

Every request is waiting, running in a row of the cache, or finished. A step admits waiting requests into free rows,
reads some of their prompts and one token of every row that is replying, all in one pass, and draws the next tokens.
What a row already holds of a prompt is not read again: the samples of a prompt, the turns of a conversation and
requests with the same beginning share it. The engine knows ids only.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanollm.generate import cpu_runner as native
from nanollm.generate.request import Completion, Drawn, Ints, Kernels, Piece, Quantize, Request, Scored, Seen, Work
from nanollm.generate.runner import open_runner
from nanollm.generate.sampling import SamplingConfig, sample, uniforms
from nanollm.model.transformer import Transformer
from nanollm.threads import watch_cores

CHUNK = 512
"""Prompt tokens read in one pass, so that long prompts do not hold up the replies that are running."""

LONGEST_CHUNK = 2048
"""Where nobody waits for a first token more is read at once, up to this much: buffers grow with it."""

WORTH_WAITING = 16
"""A request waits for another that is about to read at least this many tokens of the same beginning."""


@dataclass(eq=False)
class Row:
    """One place in the cache, and what was last read into it."""

    number: int
    completion: Completion | None = None
    """Who uses it; None: it is free."""
    size: int = 0
    """Tokens of its prompt."""
    read: int = 0
    """How many of them the cache holds. They stay usable when the row is free again."""
    outlook: Seen | None = None
    """What the model said after the whole prompt."""
    newest: int = 0
    """The token drawn last, which the next pass reads."""


class Engine:
    """Runs many requests at once.  Not thread-safe: one thread owns it."""

    def __init__(
        self,
        model: Transformer,
        *,
        rows: int,
        length: int | None = None,
        chunk: int = CHUNK,
        quantize: Quantize = "none",
        kernels: Kernels = "auto",
    ) -> None:
        """Room for `rows` requests at once, of `length` tokens each (None: the model's context).

        The weights must not change while it lives. ValueError for what this machine cannot do.
        """
        limit = model.config.context_length
        for name, value in (("rows", rows), ("chunk", chunk)):
            if value < 1:
                raise ValueError(f"the engine's {name} must be at least 1, got {value}")
        if length is not None and not 1 < length <= limit:
            raise ValueError(f"the engine's length must be from 2 to the model's context of {limit:,}, got {length:,}")
        self.vocab_size, self.length, self.chunk = model.config.vocab_size, length or limit, chunk
        watch_cores()
        self.runner = open_runner(model, rows, self.length, chunk, quantize, kernels)
        self.rows = [Row(number) for number in range(rows)]
        self.prompts = np.full((rows, self.length), -1, dtype=np.int64)  # what each row read or is about to read
        self.queue: deque[Completion] = deque()
        self.free = deque(self.rows)  # the one that was used longest ago first
        self.reading: list[Row] = []
        self.replying: list[Row] = []
        self.prompt_tokens = self.reused_tokens = self.drawn_tokens = 0

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
        return len(self.rows) - len(self.free)

    @property
    def cache_bytes(self) -> int:
        return self.runner.cache_bytes

    def submit(self, request: Request) -> Completion:
        """Queue a request; ValueError if its prompt cannot be continued."""
        check_prompt(request.prompt, self.length, self.vocab_size)
        if any(token >= self.vocab_size for token in request.sampling.logit_bias):
            greatest = max(request.sampling.logit_bias)
            raise ValueError(f"logit_bias speaks of token {greatest}, the model has {self.vocab_size:,} tokens")
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
        asked = self._admit()
        pieces = list(self._pieces())
        replying = self.replying.copy()
        seen = [row.outlook for row in asked if row.outlook is not None]
        if pieces or replying:
            seen.append(self.runner.run(self._work(pieces, replying)))
        if not seen:
            return []
        logits = seen[0].logits if len(seen) == 1 else torch.cat([part.logits for part in seen])
        experts = np.concatenate([part.experts for part in seen])
        ended = self._note(pieces)
        for place, row in enumerate(ended, start=len(asked)):
            row.outlook = Seen(logits[place : place + 1].clone(), experts[place : place + 1])
        self.replying += [*asked, *ended]
        return self._draw([*asked, *ended, *replying], logits, experts)

    # --- schedule ---

    def _admit(self) -> list[Row]:
        """Give rows to waiting requests, first come, first served, unless another is worth waiting for.

        Returns the rows whose whole prompt was read before, so that their reply can begin at once.
        """
        asked: list[Row] = []
        held_back: list[Completion] = []
        while self.queue and len(held_back) < len(self.free):
            completion = self.queue.popleft()
            prompt = np.array(completion.request.prompt, dtype=np.int64)
            is_same = self.prompts[:, : len(prompt)] == prompt  # (rows, n)
            shared = np.where(is_same.all(1), len(prompt), is_same.argmin(1))
            ready = np.minimum(shared, [row.read for row in self.rows])
            coming = max((int(shared[row.number]) for row in self.reading), default=0)
            if coming - ready.max() >= WORTH_WAITING:
                held_back.append(completion)
                continue
            source = self.rows[int(ready.argmax())]
            is_spare = source.completion is None and source.read - ready.max() < WORTH_WAITING  # little would be lost
            row = source if is_spare else self.free[0]
            self.free.remove(row)
            if self._begin(row, completion, prompt, source, int(ready.max())):
                asked.append(row)
            else:
                self.reading.append(row)
        self.queue.extendleft(reversed(held_back))
        return asked

    def _begin(self, row: Row, completion: Completion, prompt: Ints, source: Row, ready: int) -> bool:
        """Put a request into a row, with what `source` has read of its prompt; true if that is all of it."""
        is_whole = ready == len(prompt) == source.size
        outlook, read = (source.outlook, ready) if is_whole else (None, min(ready, len(prompt) - 1))
        if read and row is not source:
            self.runner.copy(source.number, row.number, read)
        row.completion, row.size, row.read, row.outlook = completion, len(prompt), read, outlook
        self.prompts[row.number] = -1
        self.prompts[row.number, : len(prompt)] = prompt
        self.reused_tokens += read
        return is_whole

    def _pieces(self) -> Iterator[Piece]:
        """The next pieces of the prompts that are being read, no more than `chunk` tokens together.

        Each gets its share of the chunk, and what the short ones leave of theirs goes to the longer ones.
        """
        room = self.chunk
        for place, row in enumerate(sorted(self.reading, key=lambda row: row.size - row.read)):
            share = -(-room // (len(self.reading) - place))
            end = min(row.size, row.read + share)
            room -= end - row.read
            if end > row.read:
                yield Piece(row.number, row.read, self.prompts[row.number, row.read : end], end == row.size)

    def _work(self, pieces: list[Piece], replying: list[Row]) -> Work:
        places = [row.size + len(row.completion.ids) - 1 for row in replying if row.completion is not None]
        columns = ([row.number for row in replying], [row.newest for row in replying], places)
        return Work(pieces, *(np.array(column, dtype=np.int64) for column in columns))

    def _note(self, pieces: list[Piece]) -> list[Row]:
        """Write down what was read; returns the rows whose prompt ended."""
        for piece in pieces:
            self.rows[piece.row].read += len(piece.ids)
            self.prompt_tokens += len(piece.ids)
        ended = [self.rows[piece.row] for piece in pieces if piece.is_last]
        self.reading = [row for row in self.reading if row not in ended]
        return ended

    def _release(self, row: Row) -> None:
        row.completion = None
        self.free.append(row)
        for rows in (self.reading, self.replying):
            if row in rows:
                rows.remove(row)

    # --- postprocess ---

    def _draw(self, rows: list[Row], logits: Tensor, experts: Ints) -> list[Drawn]:
        """One token for each of these rows, from its logits (W, V)."""
        completions = [row.completion for row in rows if row.completion is not None]
        ids, logprobs = sample_each(logits, completions)
        drawn = []
        for index, (row, completion) in enumerate(zip(rows, completions, strict=True)):
            top, scored = completion.request.top_logprobs, None
            if top is not None:
                scored = score(logits[index], ids[index], top, experts[index].tolist())
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
            has_room = row.size + len(completion.ids) - 1 < self.length  # the newest token is not in the cache yet
            if request.stop is not None and request.stop(token):
                completion.finish = "stop"
            elif len(completion.ids) == request.max_tokens or not has_room:
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
    if not (min(prompt) >= 0 and max(prompt) < vocab_size):
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
        drawn, likely = choose(rows, settings[number], numbers, members)
        ids[indices], logprobs[indices] = drawn.cpu().numpy(), likely.cpu().numpy()
    return ids.tolist(), logprobs.tolist()


def choose(logits: Tensor, c: SamplingConfig, numbers: Tensor, members: Sequence[Completion]) -> tuple[Tensor, Tensor]:
    """As `sample`, by the fastest way of this machine; `members` are the requests whose rows these are."""
    device = logits.device
    if c.is_plain and device.type == "cpu" and native.can_draw():
        return native.draw(logits, c.temperature, numbers)
    seen = (torch.tensor([*member.request.prompt, *member.ids], device=device).unique() for member in members)
    return sample(logits, c, numbers, seen)


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
    quantize: Quantize = "none",
) -> list[Completion]:
    """Continue each prompt `samples` times by at most `max_tokens` ids, within the model's context.

    The samples of a prompt stand beside each other. Reply i draws from seed + i alone; `stop` makes the function that
    is told its tokens (see Request.stop).
    """
    if not prompts or not all(prompts):
        raise ValueError("expected at least one prompt and no empty one (a document starts with the <s> token)")
    for name, value in (("samples", samples), ("max_tokens", max_tokens)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    repeated = [prompt for prompt in prompts for _ in range(samples)]
    for prompt in prompts:
        check_prompt(prompt, model.config.context_length, model.config.vocab_size)
    length = min(max(map(len, prompts)) + max_tokens, model.config.context_length)
    chunk = min(sum(map(len, prompts)), LONGEST_CHUNK)
    engine = Engine(model, rows=len(repeated), length=length, chunk=chunk, quantize=quantize)
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
