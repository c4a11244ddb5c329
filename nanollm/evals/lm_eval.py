"""Lets a bundle answer lm-evaluation-harness: log-likelihoods, whole texts, and replies to prompts.

Ids are made as by lm_eval's own model `hf`, so that an exported model scores the same there.
Letters: M ids to score, D model width, V vocabulary.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor, nn

from nanollm.bundle import Bundle
from nanollm.evals.documents import BATCH_TOKENS
from nanollm.generate.engine import Engine
from nanollm.generate.request import Request
from nanollm.generate.runner import tell_once
from nanollm.generate.sampling import SamplingConfig
from nanollm.model.transformer import Transformer
from nanollm.progress import Progress
from nanollm.text.chat import reply_ends
from nanollm.text.stream import TextStream
from nanollm.train.loss import MAX_LOGITS

MAX_TOKENS = 256
"""Of a reply, where its task says nothing: as lm_eval's `hf`."""
FILTERS = {"top_k", "top_p", "min_p", "repetition_penalty"}

Ids = list[int]
ScoredRequest = tuple[Any, Ids, Ids]  # lm_eval's texts, the ids of a context, the ids that are scored after it
Row = tuple[tuple[int, ...], list[int]]  # what the model reads, and the requests that it answers


class NanoLM(TemplateLM):  # type: ignore[misc]  # lm_eval has no types
    """A bundle for lm_eval. Every text begins with <s>, as in training."""

    def __init__(self, bundle: Bundle, rows: int = 256, seed: int = 0) -> None:
        """rows: texts at once; reply i draws from seed + i."""
        super().__init__()
        self.bundle, self.rows, self.seed = bundle, rows, seed
        self.max_length = bundle.model.config.context_length

    @property
    def eot_token_id(self) -> int:
        return self.bundle.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.bundle.tokenizer.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> Ids:
        """Ids of a text, after <s> unless add_special_tokens is false."""
        ids = self.bundle.tokenizer.encode(string)
        return ids if add_special_tokens is False else [self.prefix_token_id, *ids]

    # --- how likely is a text ---

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, in nats: every id once, after <s>, in windows of the model's context.

        lm_eval's `hf` does this with add_bos_token=False; else it adds how likely <s> is after <s>.
        """
        windows: list[ScoredRequest] = []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                windows.append((number, *make_disjoint_window(window)))
        sums = [0.0] * len(requests)
        for (number, _, _), (logprob, _) in zip(windows, self._loglikelihood_tokens(windows), strict=True):
            sums[number] += logprob
        return sums

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: Sequence[ScoredRequest], disable_tqdm: bool = False, **_: object
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of the scored ids of each request after its context, in nats, and whether each is greedy.

        A context loses its beginning where both do not fit the model's. Requests that differ in their last id only,
        such as the letters of a choice, are answered by one row.
        """
        asked: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for number, (_, context, scored) in enumerate(requests):
            self._check(context, scored)
            asked[tuple([*context, *scored][-self.max_length - 1 : -1])].append(number)
        wanted = [scored for _, _, scored in requests]
        answers: dict[int, tuple[float, bool]] = {}
        with Progress("scoring", len(requests), "texts") as bar, self.bundle.model.evaluating():
            for batch in batches(list(asked.items()), self.rows):
                found = score(self.bundle.model, batch, wanted)
                answers |= found
                bar.advance(len(found))
        return [answers[number] for number in range(len(requests))]

    def _check(self, context: Ids, scored: Ids) -> None:
        """Refuse what cannot be scored: what is too long, or has no id of its own behind the context's."""
        if not 0 < len(scored) <= self.max_length:
            before, text = (self.bundle.tokenizer.decode(ids) for ids in (context[-10:], scored))
            raise ValueError(
                f"a task asks how likely {text!r:.60} is after {before!r}: expected 1 to {self.max_length:,} tokens "
                f"(the model's context), got {len(scored):,}; leave the task out"
            )

    # --- what follows a prompt ---

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text after each prompt, up to a stop text, an end token, or its most tokens."""
        tokenizer = self.bundle.tokenizer
        streams: list[TextStream] = []
        asked: list[Request] = []
        for number, (prompt, settings) in enumerate(request.args for request in requests):
            max_tokens, sampling, stops = read_settings(settings)
            streams.append(TextStream(tokenizer, stops))
            asked.append(
                Request(
                    prompt=self._end_of(self.tok_encode(prompt), max_tokens),
                    max_tokens=max_tokens,
                    sampling=sampling,
                    stop_token_ids=reply_ends(tokenizer),
                    stop=streams[-1].stops_at,
                    seed=self.seed + number,
                )
            )
        self._run(asked)
        for stream in streams:
            stream.close()
        return [stream.text for stream in streams]

    def _end_of(self, prompt: Ids, max_tokens: int) -> Ids:
        """As much of a prompt's end as leaves room for the reply; half of the context if the reply could fill it."""
        room = self.max_length - max_tokens
        if room < 1:
            room = self.max_length // 2
            tell_once(
                f"a task asks for replies of {max_tokens:,} tokens, the model's context is {self.max_length:,}: "
                f"prompts keep their last {room:,} tokens, replies end with the context"
            )
        return prompt[-room:]

    def _run(self, requests: Sequence[Request]) -> None:
        longest = max(len(request.prompt) + request.max_tokens for request in requests)
        engine = Engine(self.bundle.model, rows=min(self.rows, len(requests)), length=min(longest, self.max_length))
        for request in requests:
            engine.submit(request)
        with Progress("replying", len(requests), "replies") as bar:
            while engine.has_work:
                bar.advance(sum(drawn.completion.finish is not None for drawn in engine.step()))


def read_settings(generation_kwargs: Mapping[str, Any]) -> tuple[int, SamplingConfig, list[str]]:
    """What a task wants of a reply: its most tokens, how to choose them, and its stop texts."""
    wanted = dict(normalize_gen_kwargs(generation_kwargs, MAX_TOKENS))
    max_tokens, stops = wanted.pop("max_gen_toks"), wanted.pop("until")
    is_drawn, temperature = wanted.pop("do_sample"), wanted.pop("temperature", 0.0)
    if wanted.get("num_beams") == 1:
        del wanted["num_beams"]  # some tasks say it; there is nothing else here
    if unknown := sorted(wanted.keys() - FILTERS):
        raise ValueError(
            f"a task's generation_kwargs may hold until, max_gen_toks, do_sample, temperature and "
            f"{', '.join(sorted(FILTERS))}, got {unknown[0]}: {wanted[unknown[0]]}; leave the task out"
        )
    sampling = SamplingConfig(temperature=float(temperature) if is_drawn else 0.0, **wanted)
    return max_tokens, sampling, [stop for stop in stops if stop]


# --- scores of many rows ---


def batches(rows: list[Row], most: int) -> Iterator[list[Row]]:
    """Rows of like lengths, the longest first: at most `most` together, of at most BATCH_TOKENS places."""
    rows = sorted(rows, key=lambda row: -len(row[0]))
    while rows:
        count = max(1, min(most, BATCH_TOKENS // len(rows[0][0])))
        yield rows[:count]
        rows = rows[count:]


def score(model: Transformer, batch: Sequence[Row], scored: Sequence[Ids]) -> dict[int, tuple[float, bool]]:
    """The answer of each request of a batch, by its number; scored[number] are the last ids that its row predicts."""
    longest = len(batch[0][0])
    tokens = torch.zeros(len(batch), longest, dtype=torch.int64)  # padded on the right, where no real token looks
    places: list[int] = []
    for row, (ids, numbers) in enumerate(batch):
        tokens[row, : len(ids)] = torch.tensor(ids)
        end = row * longest + len(ids)
        places += [place for number in numbers for place in range(end - len(scored[number]), end)]
    asked = [number for _, numbers in batch for number in numbers]
    targets = torch.tensor([token for number in asked for token in scored[number]])  # (M,)
    device = model.head.weight.device
    hidden = model.trunk(tokens.to(device)).flatten(0, 1)[torch.tensor(places, device=device)]  # (M, D)
    logprobs, is_greedy = token_scores(model.head, hidden, targets.to(device))
    sizes = [len(scored[number]) for number in asked]
    parts = zip(asked, logprobs.split(sizes), is_greedy.split(sizes), strict=True)
    return {number: (part.sum().item(), bool(hits.all())) for number, part, hits in parts}


def token_scores(head: nn.Linear, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each target (M,) float32, and whether it is the most likely id (M,) bool; hidden (M, D)."""
    rows = max(1, MAX_LOGITS // head.out_features)
    logprobs, is_greedy = [], []
    for states, wanted in zip(hidden.split(rows), targets.split(rows), strict=True):
        chunk = head(states).float().log_softmax(-1)  # (rows, V)
        logprobs.append(chunk.gather(-1, wanted[:, None])[:, 0])
        is_greedy.append(chunk.argmax(-1) == wanted)
    return torch.cat(logprobs), torch.cat(is_greedy)
