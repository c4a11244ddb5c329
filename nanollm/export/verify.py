"""Compares an exported model, in its engine, with the bundle it was made of.

Three comparisons: the ids of texts and conversations, how both see every position of some texts, and greedy replies.
If weights and arithmetic are of one kind (f32; bf16 and f16 in transformers, which then computes in float32) both must
agree to TOLERANCE and in every token. Where llama.cpp rounds what it computes with (all other types) the most likely
token must be the same at ROUNDED_AGREEMENT of the positions (within the 95 % interval), and the perplexity within
ROUNDED_PERPLEXITY. In q5_0 and q4_0 the weights themselves are rounded so far that the comparison is with those in the
file, and what this rounding costs is a line of its own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from math import ceil, exp

import torch
from torch import Tensor

from nanollm.bundle import Bundle
from nanollm.evals.stats import wilson
from nanollm.generate.engine import generate
from nanollm.generate.sampling import SamplingConfig
from nanollm.sources import builtin
from nanollm.text.chat import Conversation, Message, encode_conversation, encode_prompt
from nanollm.text.tokenizer import Tokenizer

TOLERANCE = 1e-4
ROUNDED_AGREEMENT = 0.99
ROUNDED_PERPLEXITY = 0.005
POSITIONS = 2_000
REPLY_TOKENS = 64
PROMPT_TOKENS = 24
WINDOW = 200

WIDTH = 32  # of the table's first column

Ids = Sequence[int]

TRICKY = (
    "",
    " leading and trailing ",
    "  two  spaces\t\ttabs\n\nnewlines \r\n",
    "0123456789 3.14 1,000",
    "é ﬁ 漢字 😀 \u200d\u0000\u0378",
    "</s> <|user|> <|end|> <s> <unk> <0x0A>",
)


@dataclass(frozen=True)
class Check:
    """One line of the table."""

    what: str
    wanted: str
    found: str
    holds: bool


@dataclass(frozen=True)
class Samples:
    """The questions to both."""

    texts: list[str]
    conversations: list[Conversation]
    windows: list[list[int]]
    prompts: list[list[int]]
    reply_tokens: int

    @classmethod
    def of(cls, bundle: Bundle, prompts: int) -> "Samples":
        """From the built-in corpus, what is difficult for tokenizers, and the model: a bundle has one sample."""
        context = bundle.model.config.context_length
        documents = list(islice(builtin.documents(), 100 + prompts))
        reply_tokens = min(REPLY_TOKENS, context // 2)
        begun = islice(beginnings(documents, bundle.tokenizer, context - reply_tokens), prompts)
        texts = [*TRICKY, *documents[:100]]
        return cls(texts, list(conversations(documents)), own_texts(bundle), list(begun), reply_tokens)


def own_texts(bundle: Bundle) -> list[list[int]]:
    """Ids of texts as the model itself writes them with the default sampling, POSITIONS predictions or more in all."""
    length = min(WINDOW, bundle.model.config.context_length - 1)
    empty = [bundle.tokenizer.bos_id]
    drawn = generate(
        bundle.model,
        [empty],
        SamplingConfig(),
        max_tokens=length,
        stop_token_ids=frozenset(),
        samples=ceil(POSITIONS / length),
    )
    return [[*empty, *completion.ids] for completion in drawn]


def beginnings(documents: Sequence[str], tokenizer: Tokenizer, room: int) -> Iterator[list[int]]:
    """A document's first ids and a question, in turn; at most `room` ids each."""
    for number, text in enumerate(documents):
        yield [tokenizer.bos_id, *tokenizer.encode(text)][: min(PROMPT_TOKENS, room)]
        question = encode_prompt(Conversation.of(f"{text[:80]} {number}?"), tokenizer)
        if len(question) <= room:
            yield question


def conversations(documents: Sequence[str]) -> Iterator[Conversation]:
    """One to three messages, with and without a system message, with and without a reply."""
    for number, text in enumerate(documents[:100]):
        asked = Conversation.of(text[: 20 + number])
        answered = Conversation.of(text[:50], f" {text[50:90]}\n" if number % 2 else None)
        yield asked
        yield Conversation((Message("system", text[-40:]), *answered.messages))


def ids_of(conversation: Conversation, bundle: Bundle) -> list[int]:
    """What our own commands feed: a prompt if the user has the last word."""
    if conversation.messages[-1].role == "user":
        return encode_prompt(conversation, bundle.tokenizer)
    return encode_conversation(conversation, bundle.tokenizer).ids


@dataclass(frozen=True)
class TokenScores:
    """Scores of the predicted positions of one window: (n,) each."""

    top: Tensor  # int64, the most likely token
    highest: Tensor  # its logit
    logit: Tensor  # of the token that follows
    log_total: Tensor  # logit - log_total is the log-probability

    @property
    def normalised(self) -> "TokenScores":
        """With log-probabilities for logits."""
        zeros = torch.zeros_like(self.log_total)
        return TokenScores(self.top, self.highest - self.log_total, self.logit - self.log_total, zeros)

    @classmethod
    def of(cls, logits: Tensor, ids: Ids) -> "TokenScores":
        """From logits (T, V) of a window of T ids."""
        logits = logits[:-1].float()
        highest, top = logits.max(-1)
        following = torch.tensor(ids[1:], device=logits.device)
        return cls(top, highest, logits.gather(-1, following[:, None])[:, 0], logits.logsumexp(-1))


@torch.inference_mode()
def our_logits(bundle: Bundle, ids: Ids) -> Tensor:
    """(T, V)."""
    return bundle.model(torch.tensor([ids]))[0]


def our_replies(bundle: Bundle, samples: Samples) -> list[list[int]]:
    """Greedy ids after each prompt; nothing ends a reply early."""
    greedy = SamplingConfig(temperature=0)
    done = generate(bundle.model, samples.prompts, greedy, max_tokens=samples.reply_tokens, stop_token_ids=frozenset())
    return [completion.ids for completion in done]


# --- the table ---


def line(check: Check) -> str:
    """A line of the table."""
    return f"{'ok  ' if check.holds else 'FAIL'}  {check.what:{WIDTH}}  {check.found} (wanted: {check.wanted})"


def check_ids(what: str, ours: Sequence[Ids], theirs: Sequence[Ids], tokenizer: Tokenizer) -> Check:
    """All ids must be the same. A unigram tokenizer has equally likely cuts: there the texts of the ids must be."""
    has_ties = tokenizer.model_type == "unigram"
    pairs = [(mine, other) for mine, other in zip(ours, theirs, strict=True) if list(mine) != list(other)]
    holds = all(has_ties and tokenizer.decode(mine) == tokenizer.decode(other) for mine, other in pairs)
    wanted = "0 differ, but for equally likely cuts" if has_ties else "0 differ"
    return Check(what, wanted, f"{len(pairs):,} of {len(ours):,} differ", holds)


def check_all_ids(
    bundle: Bundle, texts: Sequence[str], read: Sequence[Ids], spoken: Sequence[Conversation], heard: Sequence[Ids]
) -> list[Check]:
    """Those of texts, whose marks are text, and of conversations: read and heard are the engine's."""
    ours = [bundle.tokenizer.encode(text) for text in texts], [ids_of(each, bundle) for each in spoken]
    return [
        check_ids("ids of texts", ours[0], read, bundle.tokenizer),
        check_ids("ids of conversations", ours[1], heard, bundle.tokenizer),
    ]


def check_difference(greatest: float, of: str = "logit") -> Check:
    return Check(f"greatest difference of a {of}", f"at most {TOLERANCE:g}", f"{greatest:.2g}", greatest <= TOLERANCE)


def check_equal_tops(
    bundle: Bundle, samples: Samples, ours: Sequence[TokenScores], theirs: Sequence[TokenScores]
) -> Check:
    """The most likely token is the same at every position, unless another is as likely, up to TOLERANCE."""
    gaps = [
        gap
        for ids, mine, other in zip(samples.windows, ours, theirs, strict=True)
        if not torch.equal(mine.top, other.top)
        for gap in (mine.highest - our_logits(bundle, ids)[:-1].gather(-1, other.top[:, None])[:, 0]).tolist()
        if gap > 0
    ]
    found = "0 differ" if not gaps else f"{len(gaps):,} differ, by {max(gaps):.1g} in logits"
    return Check(tops(ours), "0 differ, but for ties", found, max(gaps, default=0.0) <= TOLERANCE)


def check_agreement(ours: Sequence[TokenScores], theirs: Sequence[TokenScores]) -> Check:
    """At how many positions the most likely token is the same: it holds unless that is surely too few."""
    same = torch.cat([mine.top == other.top for mine, other in zip(ours, theirs, strict=True)])
    share, (low, high) = same.float().mean().item(), wilson(int(same.sum()), len(same))
    found = f"{100 * share:.2f} % the same ({100 * low:.1f} to {100 * high:.1f})"
    return Check(tops(ours), f"{100 * ROUNDED_AGREEMENT:g} %", found, high >= ROUNDED_AGREEMENT)


def tops(seen: Sequence[TokenScores]) -> str:
    return f"most likely token, {sum(len(each.top) for each in seen):,} positions"


def check_perplexity(ours: Sequence[TokenScores], theirs: Sequence[TokenScores]) -> Check:
    mine, other = (
        exp(torch.cat([seen.log_total - seen.logit for seen in side]).double().mean()) for side in (ours, theirs)
    )
    change = other / mine - 1
    found = f"{100 * change:+.3f} % ({mine:.4f} to {other:.4f})"
    return Check("perplexity", f"within {100 * ROUNDED_PERPLEXITY:g} %", found, abs(change) <= ROUNDED_PERPLEXITY)


def check_replies(
    bundle: Bundle, samples: Samples, ours: Sequence[Ids], theirs: Sequence[Ids], *, must_equal: bool
) -> Check:
    """Greedy replies, token by token; behind a first difference both go their own ways.

    Where two tokens are as likely as each other, up to TOLERANCE, either may come first.
    """
    tokens = [mine == other for pair in zip(ours, theirs, strict=True) for mine, other in zip(*pair, strict=True)]
    found = f"{100 * sum(tokens) / len(tokens):.1f} % of tokens equal"
    gaps = [
        gap_at_first_difference(bundle, prompt, mine, other)
        for prompt, mine, other in zip(samples.prompts, ours, theirs, strict=True)
        if list(mine) != list(other)
    ]
    found = f"{len(ours) - len(gaps):,} of {len(ours):,} replies equal, {found}"
    if gaps and max(gaps) <= TOLERANCE:
        found += f"; the others differ first where the two most likely tokens are {max(gaps):.1g} apart"
    wanted = "all equal, but for ties" if must_equal else "for information"
    holds = not must_equal or all(gap <= TOLERANCE for gap in gaps)
    return Check(f"greedy replies of {samples.reply_tokens} tokens", wanted, found, holds)


def gap_at_first_difference(bundle: Bundle, prompt: Ids, ours: Ids, theirs: Ids) -> float:
    """How much likelier (in logits) our token is than theirs where they first differ."""
    place = next(place for place, (mine, other) in enumerate(zip(ours, theirs, strict=True)) if mine != other)
    logits = our_logits(bundle, [*prompt, *ours[:place]])[-1]
    return float((logits[ours[place]] - logits[theirs[place]]).abs())
