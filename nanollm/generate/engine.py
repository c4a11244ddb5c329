"""Continuous batching with prefix reuse: requests join and leave between two tokens.

Every request is waiting, running in a row of the cache, or finished. A step schedules waiting requests into free rows,
prefills some of their prompts and decodes one token of every row that is replying, all in one forward pass, and samples
the next tokens. What a row holds of a prompt is not computed again: the samples of a prompt, the turns of a
conversation and requests with the same beginning share it. The engine knows ids only.

Source of continuous batching: Orca, OSDI 2022.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanollm.generate import cpu_runner as native
from nanollm.generate.request import (
    Completion,
    Draws,
    Ints,
    Kernels,
    MakeTool,
    Mask,
    ModelOutput,
    PromptChunk,
    Quantize,
    Request,
    ScheduledBatch,
    StepOutput,
    TokenLogprobs,
)
from nanollm.generate.runner import joined, open_runner
from nanollm.generate.sampling import DRAWN, REDRAWN, Bits, SamplingConfig, sample, uniforms
from nanollm.model.lora import Pairs
from nanollm.model.transformer import Transformer
from nanollm.threads import watch_cores

CHUNK = 512  # prompt tokens read in one pass, so that long prompts do not hold up the replies that are running

LONGEST_CHUNK = 2048
"""Where nobody waits for a first token more is read at once, up to this much: buffers grow with it."""

BLOCK = 16
"""Rows are found by the beginnings of what they have read, this many tokens at a time: to share less is not worth a
search, nor to wait for it."""


@dataclass(eq=False)
class Row:
    """One place in the cache, and what was last read into it."""

    number: int
    completion: Completion | None = None  # who uses it; None: it is free
    num_tokens: int = 0  # of the prompt and of the reply so far
    num_prompt_tokens: int = 0
    """Of these, what is prefilled: the prompt, and where a tool has spoken all up to the end of its words."""
    num_cached_prompt_tokens: int = 0
    """Of these, what the cache holds. They stay usable when the row is free again."""
    prompt_output: ModelOutput | None = None
    """The model's output after the whole prompt, for others with the same prompt."""
    last_token: int = 0  # the token sampled last, which the next pass reads
    adapter: int = -1  # with which it was read; -1: none
    keys: list[int] = field(default_factory=list)
    """By which it is found: see `keys_of`."""

    @property
    def is_prefilling(self) -> bool:
        return self.completion is not None and self.num_cached_prompt_tokens < self.num_prompt_tokens


class Waiting(NamedTuple):
    """A request without a row."""

    completion: Completion
    prompt: Ints
    adapter: int
    keys: list[int]


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
        adapters: Mapping[str, Pairs] | None = None,
    ) -> None:
        """Room for `rows` requests at once, of `length` tokens each (None: the model's context).

        adapters: by name. The weights must not change while it lives. ValueError for what this machine cannot do.
        """
        self.vocab_size, self.chunk = model.config.vocab_size, chunk
        self.length = length or model.config.context_length
        watch_cores()
        adapters = adapters or {}
        self.runner = open_runner(model, rows, self.length, chunk, quantize, kernels, [*adapters.values()])
        self.adapters = {name: number for number, name in enumerate(adapters)}
        self.rows = [Row(number) for number in range(rows)]
        self.prompts = np.zeros((rows, self.length), dtype=np.int64)  # what each row has read or will read
        self.rows_of: dict[int, dict[Row, None]] = {}  # by key, in the order in which they came
        self.queue: deque[Waiting] = deque()
        self.free = deque(self.rows)  # least recently used first
        self.prefilling: list[Row] = []
        self.decoding: list[Row] = []
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
        if request.adapter is not None and request.adapter not in self.adapters:
            raise ValueError(f"there is no adapter {request.adapter!r}, only {', '.join(self.adapters) or 'the model'}")
        completion, prompt = Completion(request), np.array(request.prompt, dtype=np.int64)
        adapter = -1 if request.adapter is None else self.adapters[request.adapter]
        self.queue.append(Waiting(completion, prompt, adapter, keys_of(prompt, adapter)))
        return completion

    def cancel(self, completion: Completion) -> None:
        """End a request at once; a finished one stays as it is."""
        if completion.finish is not None:
            return
        completion.finish = "cancelled"
        self.queue = deque(each for each in self.queue if each.completion is not completion)
        for row in self.rows:
            if row.completion is completion:
                self._release(row)

    @torch.inference_mode()
    def step(self) -> list[StepOutput]:
        """Run one forward pass; the tokens sampled after it, at most one for each running request."""
        reused = self._schedule_waiting()
        chunks = list(self._schedule_chunks())
        decoding = sorted(self.decoding, key=lambda row: row.adapter)  # what shares an adapter stands together
        outputs = [row.prompt_output for row in reused if row.prompt_output is not None]
        if chunks or decoding:
            output = self.runner.run(self._batch(chunks, decoding))
            outputs.append(self._score(chunks, output) if any(chunk.is_scored for chunk in chunks) else output)
        if not outputs:
            return []
        # As _sample's rows: those that begin from a kept output, those whose prompt has just ended, those decoding.
        output = joined(outputs, outputs[-1].drawn)
        prefilled = self._finish_chunks(chunks)
        for place, row in enumerate(prefilled, start=len(reused)):
            own = slice(place, place + 1)
            row.prompt_output = ModelOutput(output.logits[own].clone(), output.experts[own].clone())
        self.decoding += [*reused, *prefilled]
        return self._sample([*reused, *prefilled, *decoding], output)

    # --- schedule ---

    def _schedule_waiting(self) -> list[Row]:
        """Give rows to waiting requests, first come, first served, unless another is worth waiting for.

        Returns the rows whose whole prompt was computed before, so that their reply can begin at once.
        """
        reused: list[Row] = []
        copies: list[tuple[int, int, int]] = []  # source, tokens, target
        held_back: list[Waiting] = []
        awaited: set[int] = set()  # prompts of those held back
        while self.queue and len(held_back) < len(self.free):
            waiting, source, ready = self.queue.popleft(), None, 0
            if waiting.completion.request.prompt_logprobs is None:
                if waiting.keys[-1] not in awaited:
                    source, ready, coming = self._find(waiting)
                # Of eight samples of a long prompt one reads it, and seven copy it from there a step or two later.
                if waiting.keys[-1] in awaited or coming - ready >= BLOCK:
                    held_back.append(waiting)
                    awaited.add(waiting.keys[-1])
                    continue
            # Continue in the row itself if nobody uses it and little of what it holds would be lost; else copy.
            row = self.free[0]
            if source is not None and source.completion is None and source.num_cached_prompt_tokens - ready < BLOCK:
                row = source
            self.free.remove(row)
            if self._begin(row, waiting, source, ready):
                reused.append(row)
            else:
                self.prefilling.append(row)
            if row is not source and row.num_cached_prompt_tokens:
                assert source is not None
                copies.append((source.number, row.num_cached_prompt_tokens, row.number))
        self.queue.extendleft(reversed(held_back))
        for (number, count), several in groupby(copies, lambda each: each[:2]):
            self.runner.copy(number, [target for *_, target in several], count)
        return reused

    def _find(self, waiting: Waiting) -> tuple[Row | None, int, int]:
        """The row that holds most of a prompt, how many tokens that is, and how many another is about to hold.

        Any row will do, also one in use: what it has read of its prompt does not change until it is given away.
        """
        best, ready, coming = None, 0, 0
        for place in reversed(range(len(waiting.keys))):
            end = min((place + 1) * BLOCK, len(waiting.prompt))
            for row in self.rows_of.get(waiting.keys[place], ()):
                if row.is_prefilling:
                    coming = max(coming, end)
                if (held := min(row.num_cached_prompt_tokens, end)) > ready:
                    best, ready = row, held
                if ready == end:  # what is found by a shorter beginning holds less
                    break
            if ready == end:
                break
        if best is not None:
            most = min(best.num_cached_prompt_tokens, len(waiting.prompt))
            is_same = self.prompts[best.number, :most] == waiting.prompt[:most]
            ready = most if is_same.all() else int(is_same.argmin())
        return best, ready, coming

    def _begin(self, row: Row, waiting: Waiting, source: Row | None, ready: int) -> bool:
        """Put a request into a row, with what `source` holds of its prompt; true if that is all of it."""
        completion, prompt, adapter, keys = waiting
        is_whole = source is not None and ready == len(prompt) == source.num_prompt_tokens
        # The last token of a prompt is computed anew unless the output after it was kept: its logits are needed.
        output, reused = (source.prompt_output, ready) if source and is_whole else (None, min(ready, len(prompt) - 1))
        row.completion, row.prompt_output, row.adapter = completion, output, adapter
        row.num_tokens = row.num_prompt_tokens = len(prompt)
        row.num_cached_prompt_tokens = reused
        self._remember(row, prompt, keys)
        self.reused_tokens += reused
        return is_whole

    def _remember(self, row: Row, prompt: Ints, keys: list[int]) -> None:
        """Note what a row has read or will read, so that it is found."""
        self.prompts[row.number, : len(prompt)] = prompt
        for key in row.keys:
            del self.rows_of[key][row]
            if not self.rows_of[key]:
                del self.rows_of[key]
        row.keys = keys
        for key in keys:
            self.rows_of.setdefault(key, {})[row] = None

    def _schedule_chunks(self) -> Iterator[PromptChunk]:
        """The next chunks of the prompts that are being prefilled, no more than `chunk` tokens together.

        Each gets its share, and what the short ones leave of theirs goes to the longer ones.
        """
        room = self.chunk
        shortest_first = sorted(self.prefilling, key=lambda row: row.num_prompt_tokens - row.num_cached_prompt_tokens)
        for place, row in enumerate(shortest_first):
            share = -(-room // (len(shortest_first) - place))
            start = row.num_cached_prompt_tokens
            end = min(row.num_prompt_tokens, start + share)
            room -= end - start
            if end > start:
                ids, is_last = self.prompts[row.number, start:end], end == row.num_prompt_tokens
                yield PromptChunk(row.number, start, ids, is_last, row.adapter, is_scored(row, end))

    def _batch(self, chunks: list[PromptChunk], decoding: list[Row]) -> ScheduledBatch:
        columns = [(row.number, row.last_token, row.num_tokens - 1, row.adapter) for row in decoding]
        rows, tokens, positions, adapters = np.array(columns, dtype=np.int64).reshape(-1, 4).T
        draws = None
        if self.runner.draws and decoding:
            completions = [row.completion for row in decoding if row.completion is not None]
            if all(each.request.is_plain for each in completions):
                temperatures = [each.request.sampling.temperature for each in completions]
                seeds = np.array([each.request.seed for each in completions])
                draws = Draws(temperatures, seeds, np.array([len(each.logprobs) for each in completions]))
        return ScheduledBatch(chunks, rows, tokens, positions, adapters, draws)

    def _score(self, chunks: list[PromptChunk], output: ModelOutput) -> ModelOutput:
        """Note how likely the tokens of prompts are that want to know; the output without what they alone need."""
        kept, place = [], 0
        for chunk in chunks:
            completion = self.rows[chunk.row].completion
            assert completion is not None
            if chunk.is_scored:
                targets = self.prompts[chunk.row, chunk.start + 1 :][: len(chunk.ids) - chunk.is_last].tolist()
                own = range(place, place + len(targets))
                completion.prompt_logprobs += token_logprobs(
                    output, own, targets, completion.request.prompt_logprobs or 0
                )
            place += len(chunk.wanted)
            kept += [place - 1] * chunk.is_last
        kept += range(place, len(output.logits))
        return ModelOutput(output.logits[kept], output.experts[kept], output.drawn)

    def _finish_chunks(self, chunks: list[PromptChunk]) -> list[Row]:
        """Count what was computed; returns the rows whose prompt ended."""
        for chunk in chunks:
            self.rows[chunk.row].num_cached_prompt_tokens += len(chunk.ids)
            self.prompt_tokens += len(chunk.ids)
        prefilled = [self.rows[chunk.row] for chunk in chunks if chunk.is_last]
        self.prefilling = [row for row in self.prefilling if row.is_prefilling]
        return prefilled

    def _release(self, row: Row) -> None:
        row.completion = None
        self.free.append(row)
        for rows in (self.prefilling, self.decoding):
            if row in rows:
                rows.remove(row)

    # --- postprocess ---

    def _sample(self, rows: list[Row], output: ModelOutput) -> list[StepOutput]:
        """One token for each of these rows, from its logits; those of the last ones may be drawn already."""
        completions = [row.completion for row in rows if row.completion is not None]
        ids, logprobs = sample_each(output.logits, completions[: len(output.logits)])
        if output.drawn is not None:
            ids, logprobs = ids + output.drawn[0], logprobs + output.drawn[1]
        tops = [completion.request.top_logprobs for completion in completions]
        details = dict[int, TokenLogprobs]()
        for top in set(tops):
            if top is None:
                continue
            own = [index for index, each in enumerate(tops) if each == top]
            details |= zip(own, token_logprobs(output, own, [ids[index] for index in own], top), strict=True)
        outputs = []
        for index, (row, completion) in enumerate(zip(rows, completions, strict=True)):
            given = self._append_token(row, completion, ids[index], logprobs[index])
            outputs.append(StepOutput(completion, ids[index], details.get(index), given))
        self.drawn_tokens += len(outputs)
        return outputs

    def _append_token(self, row: Row, completion: Completion, token: int, logprob: float) -> Sequence[int]:
        """Add a sampled token to a reply, and see whether the reply ends with it; returns what a tool adds to it."""
        request = completion.request
        given = request.tool(token) if request.tool is not None else ()
        completion.logprobs.append(logprob)
        if completion.failure is not None:
            completion.finish = "failed"
        elif token in request.stop_token_ids and not given:
            completion.finish, completion.stop_token_id = "end", token
        else:
            self._extend(row, completion, [token], is_sampled=True)
            room = min(request.max_tokens - len(completion.ids), self.length + 1 - row.num_tokens)
            given = given[:room] if completion.finish is None else ()
            if given:
                self._prefill_given(row, completion, given)
        if completion.finish is not None:
            self._release(row)
        return given

    def _extend(self, row: Row, completion: Completion, ids: Sequence[int], is_sampled: bool) -> None:
        """Add tokens to a reply; it may end with them."""
        request = completion.request
        completion.ids += ids
        completion.is_sampled += [is_sampled] * len(ids)
        row.last_token, row.num_tokens = ids[-1], row.num_tokens + len(ids)
        if request.stop is not None and any(map(request.stop, ids)):
            completion.finish = "stop"
        elif len(completion.ids) == request.max_tokens or row.num_tokens > self.length:  # the last is not cached yet
            completion.finish = "length"

    def _prefill_given(self, row: Row, completion: Completion, given: Sequence[int]) -> None:
        """Read what a tool added as a prompt is read: behind it the next token is sampled."""
        cached = row.num_tokens - 1
        self._extend(row, completion, given, is_sampled=False)
        completion.logprobs += [0.0] * len(given)
        if completion.finish is None:
            prompt = np.array([*completion.request.prompt, *completion.ids], dtype=np.int64)
            self._remember(row, prompt, keys_of(prompt, row.adapter))
            row.num_prompt_tokens, row.num_cached_prompt_tokens, row.prompt_output = row.num_tokens, cached, None
            self.decoding.remove(row)
            self.prefilling.append(row)


def keys_of(prompt: Ints, adapter: int) -> list[int]:
    """A number for each beginning of a prompt by which it is found: of every BLOCK tokens, and the whole."""
    keys = [adapter]
    for start in range(0, len(prompt), BLOCK):
        keys.append(hash((keys[-1], prompt[start : start + BLOCK].tobytes())))
    return keys[1:]


def is_scored(row: Row, end: int) -> bool:
    """Whether the likelihood of what a row reads up to there is asked for: of its prompt, not of a tool's words."""
    request = row.completion.request if row.completion else None
    return request is not None and request.prompt_logprobs is not None and end <= len(request.prompt)


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
    """A token and its log-probability for each row of logits (W, V).

    What a constraint refuses is drawn again, among what it allows: that gives a token as often as a single draw among
    those would, and most masks are never made. Filters choose among what is allowed, so there it is made first.
    """
    ids, logprobs = draw_each(logits, completions, range(len(completions)), DRAWN)
    again = [
        index
        for index, completion in enumerate(completions)
        if (constraint := completion.request.constraint) is not None
        and (completion.request.sampling.filters or not constraint.take(ids[index]))
    ]
    if again:
        members = [completions[index] for index in again]
        drawn = draw_each(logits, members, again, REDRAWN, masks_of(members, logits.shape[-1]))
        for index, completion, token, logprob in zip(again, members, *drawn, strict=True):
            ids[index], logprobs[index] = token, logprob
            constraint = completion.request.constraint
            if constraint is not None and not constraint.take(token):
                completion.failure = constraint.reason
    return ids, logprobs


def draw_each(
    logits: Tensor,
    completions: Sequence[Completion],
    places: Sequence[int],
    stream: np.uint64,
    allowed: Bits | None = None,
) -> tuple[list[int], list[float]]:
    """A token and its log-probability for each completion, from its place in logits (W, V); those that choose alike are
    drawn together. allowed: what each may draw; None: all."""
    alike: dict[int, list[int]] = {}
    settings: list[SamplingConfig] = []
    for index, completion in enumerate(completions):
        c = completion.request.sampling
        if c not in settings:
            settings.append(c)
        alike.setdefault(settings.index(c), []).append(index)
    ids, logprobs = [0] * len(completions), [0.0] * len(completions)
    for number, indices in alike.items():
        members = [completions[index] for index in indices]
        seeds, draws = zip(*((member.request.seed, len(member.logprobs)) for member in members), strict=True)
        numbers = uniforms(np.array(seeds), np.array(draws), stream)
        rows = [places[index] for index in indices]
        drawn = choose(logits, rows, settings[number], numbers, members, None if allowed is None else allowed[indices])
        for index, token, logprob in zip(indices, *(each.tolist() for each in drawn), strict=True):
            ids[index], logprobs[index] = token, logprob
    return ids, logprobs


def choose(
    logits: Tensor,
    places: Sequence[int],
    c: SamplingConfig,
    numbers: Tensor,
    members: Sequence[Completion],
    allowed: Bits | None,
) -> tuple[Tensor, Tensor]:
    """As `sample`, by the fastest way of this machine; `members` are the requests whose rows stand at these places."""
    device = logits.device
    if not (c.filters or c.shifts) and device.type == "cpu" and native.can_draw():
        return native.draw(logits, c.temperature, numbers, places, allowed)
    seen = (torch.tensor([*member.request.prompt, *member.ids], device=device).unique() for member in members)
    return sample(logits if len(places) == len(logits) else logits[places], c, numbers, seen, allowed)


def masks_of(completions: Sequence[Completion], vocab_size: int) -> Bits:
    """(B, bytes): what may come next by the constraint of each."""
    bits = np.zeros((len(completions), -(-vocab_size // 64) * 8), dtype=np.uint8)
    address, stride = bits.ctypes.data, bits.shape[1]
    for row, completion in enumerate(completions):
        assert completion.request.constraint is not None
        completion.request.constraint.allow(address + row * stride)
    return bits


def token_logprobs(output: ModelOutput, places: Sequence[int], tokens: Sequence[int], top: int) -> list[TokenLogprobs]:
    """Log-probabilities of each of `tokens` and of the `top` most likely ones at its place in the output."""
    logprobs = output.logits[[*places]].log_softmax(-1)  # (N, V)
    most = logprobs.topk(min(top, logprobs.shape[-1]))
    own = logprobs.gather(-1, torch.tensor([tokens], dtype=torch.int64, device=logprobs.device).T)[:, 0]
    pairs = [[*zip(*each, strict=True)] for each in zip(most.indices.tolist(), most.values.tolist(), strict=True)]
    return [*map(TokenLogprobs, own.tolist(), pairs, output.experts[[*places]].tolist())]


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    *,
    max_tokens: int,
    stop_token_ids: frozenset[int],
    seed: int = 0,
    stop: Callable[[], Callable[[int], bool]] | None = None,
    tool: MakeTool | None = None,
    constraint: Callable[[], Mask] | None = None,
    samples: int = 1,
    quantize: Quantize = "none",
) -> list[Completion]:
    """Continue each prompt `samples` times by at most `max_tokens` ids, within the model's context.

    The samples of a prompt stand beside each other. Reply i draws from seed + i alone; `stop`, `tool` and `constraint`
    make what is told its tokens (see Request). ValueError where a constraint gave up.
    """
    for prompt in prompts:  # before the cache is allocated
        check_prompt(prompt, model.config.context_length, model.config.vocab_size)
    repeated = [prompt for prompt in prompts for _ in range(samples)]
    length = min(max(map(len, prompts)) + max_tokens, model.config.context_length)
    chunk = min(sum(map(len, prompts)), LONGEST_CHUNK)
    engine = Engine(model, rows=len(repeated), length=length, chunk=chunk, quantize=quantize)
    completions = [
        engine.submit(
            Request(
                prompt=prompt,
                max_tokens=max_tokens,
                sampling=sampling,
                stop_token_ids=stop_token_ids,
                stop=None if stop is None else stop(),
                tool=None if tool is None else tool(),
                constraint=None if constraint is None else constraint(),
                seed=seed + number,
            )
        )
        for number, prompt in enumerate(repeated)
    ]
    while engine.has_work:
        engine.step()
    for completion in completions:
        check_finish(completion)
    return completions


def check_finish(completion: Completion) -> None:
    """ValueError if its constraint gave up."""
    if completion.failure is not None:
        raise ValueError(completion.failure)
