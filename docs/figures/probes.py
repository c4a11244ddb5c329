"""What happens inside a model while it reads?

Hooks on the real modules: the model computes as always, and what passes by is looked at.
Letters: B rows, T tokens, S places looked at, D model width, H heads, E experts, K experts per token.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nanollm.data.batches import Batch
from nanollm.model.attention import LatentAttention
from nanollm.model.layers import Places, rotate
from nanollm.model.moe import MoE, route
from nanollm.model.transformer import Transformer
from nanollm.text.tokenizer import Tokenizer
from nanollm.train.loss import cross_entropy_sum

Facts = dict[str, Any]

SETTLED = 32  # places from which a query counts: before, there is little to choose from
OFTEN = 20  # occurrences from which a token is said to have a favourite expert
CODE = re.compile(
    r"def|return|self|import|None|True|False|elif|lambda|assert|async|yield|except|raise|fn|let|impl|struct|"
    r"pub|mut|int|str|bool|void|const|static|function|var|uint256|address|float|len|print|range|cls|isinstance|"
    r"dict|tuple|np"
)


@contextmanager
def entering(modules: Iterable[nn.Module], look: Callable[..., None]) -> Iterator[None]:
    """While the block runs, look(number, *arguments) is called before each of these modules computes."""
    with ExitStack() as stack:
        for number, module in enumerate(modules):
            hook = module.register_forward_pre_hook(lambda _, arguments, number=number: look(number, *arguments))
            stack.callback(hook.remove)
        yield


@contextmanager
def leaving(modules: Iterable[nn.Module], look: Callable[[int, Tensor], None]) -> Iterator[None]:
    """While the block runs, look(number, answer) is called after each of these modules has computed."""
    with ExitStack() as stack:
        for number, module in enumerate(modules):
            hook = module.register_forward_hook(lambda _, __, answer, number=number: look(number, answer))
            stack.callback(hook.remove)
        yield


# --- the residual stream ---


@torch.inference_mode()
def streams(model: Transformer, batches: Sequence[Batch], token_bytes: Tensor) -> Facts:
    """How large the stream is after each block, what each half of a block adds, and what could be said there already.

    Sizes are root mean squares over D. Bits per byte: head(norm(stream)) after the embedding and after each block.
    """
    blocks = list(model.trunk.blocks)
    sizes: dict[str, dict[int, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    nats, n_bytes = Counter[int](), 0

    def note(name: str) -> Callable[..., None]:
        return lambda number, x, *_: sizes[name][number].append(x.float().square().mean(-1).sqrt().flatten())

    def read_out(number: int, x: Tensor, targets: Tensor) -> None:
        nats[number] += cross_entropy_sum(model.head, model.trunk.norm(x), targets).item()

    for batch in batches:
        sizes_here = torch.where(batch.targets < 0, 0, token_bytes[batch.targets.clamp(min=0)])
        targets = batch.targets.where(sizes_here > 0, -100)
        n_bytes += int(sizes_here.sum())
        with (
            entering(blocks, note("stream")),
            leaving(blocks[-1:], lambda _, x: note("stream")(len(blocks), x)),
            leaving([block.attention for block in blocks], note("attention")),
            leaving([block.ffn for block in blocks], note("ffn")),
            entering(blocks, lambda number, x, *_, targets=targets: read_out(number, x, targets)),
            leaving(blocks[-1:], lambda _, x, targets=targets: read_out(len(blocks), x, targets)),
        ):
            model.trunk(batch.tokens)
    facts: Facts = {f"{name}_rms": [spread(found[number]) for number in sorted(found)] for name, found in sizes.items()}
    return facts | {"bits_per_byte": [nats[number] / (n_bytes * math.log(2)) for number in sorted(nats)]}


def spread(parts: Sequence[Tensor]) -> dict[str, float]:
    """Median, and the range that holds nine in ten."""
    low, middle, high = torch.cat(list(parts)).quantile(torch.tensor([0.05, 0.5, 0.95])).tolist()
    return {"median": middle, "low": low, "high": high}


# --- attention ---


def attention_weights(attention: LatentAttention, x: Tensor, places: Places) -> Tensor:
    """How much each place takes from each place before it, in expanded form: x (B, T, D) to (B, H, T, S), S = T."""
    c = attention.config
    q = torch.cat(attention.queries(x, places.table), dim=-1)  # (B, T, H, N + R)
    latent, k_rope = attention.kv_a_proj(x).split([c.kv_lora_rank, c.qk_rope_head_dim], dim=-1)
    kv = attention.kv_b_proj(attention.kv_a_norm(latent)).unflatten(-1, (c.n_heads, -1))
    k_rope = rotate(k_rope[:, :, None], places.table).expand(-1, -1, c.n_heads, -1)
    k = torch.cat((kv[..., : c.qk_nope_head_dim], k_rope), dim=-1)
    scores = torch.einsum("bthd,bshd->bhts", q, k).float() * attention.scale
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    return scores.masked_fill(~seen, -torch.inf).softmax(-1)


@torch.inference_mode()
def weights_of(model: Transformer, tokens: Tensor) -> list[Tensor]:
    """Of each block the attention weights (B, H, T, S) while the model reads tokens (B, T)."""
    found: list[Tensor] = []
    modules = [block.attention for block in model.trunk.blocks]
    with entering(modules, lambda number, x, places, *_: found.append(attention_weights(modules[number], x, places))):
        model.trunk(tokens)
    return found


def targets_of(tokens: Tensor) -> dict[str, Tensor]:
    """Of tokens (B, T), per habit the place that each query would look at (B, T); -1 where there is none."""
    rows, length = tokens.shape
    here = torch.arange(length).expand(rows, -1)
    same = (tokens[:, :, None] == tokens[:, None, :]).tril(-1)  # (B, T, S)
    last = torch.where(same, here[:, None, :], -1).amax(-1)  # the last place before, with the same token
    behind = torch.where((last >= 0) & (last + 1 < here), last + 1, -1)
    return {"first": torch.zeros_like(here), "itself": here, "before": here - 1, "repeat": behind}


@torch.inference_mode()
def heads(model: Transformer, documents: Sequence[Tensor]) -> Facts:
    """Share of each head's attention that follows each habit, and how far back it looks; documents of T ids (rows)."""
    shares: dict[str, list[Tensor]] = defaultdict(list)
    for rows in documents:
        targets = targets_of(rows)
        distance = torch.arange(rows.shape[1])[:, None] - torch.arange(rows.shape[1])  # (T, S)
        by_block = weights_of(model, rows)
        for name, places in targets.items():
            counts = (places >= 0) & (torch.arange(rows.shape[1]) >= SETTLED)  # (B, T)
            index = places.clamp(min=0)[:, None, :, None].expand(-1, model.config.n_heads, -1, -1)
            found = [weights.gather(-1, index)[..., 0] for weights in by_block]  # (B, H, T)
            shares[name].append(torch.stack([each.transpose(0, 1)[:, counts].mean(-1) for each in found]))
        far = [(weights * distance).sum(-1)[..., SETTLED:].mean((0, 2)) for weights in by_block]
        shares["tokens_back"].append(torch.stack(far))
    return {name: torch.stack(parts).mean(0).tolist() for name, parts in shares.items()}  # by block and head


# --- experts ---


def kind_of(text: str) -> str:
    """What sort of token this is, for people."""
    core = text.strip()
    if not core:
        return "space, new line" if text else "mark, as <s>"
    if CODE.fullmatch(core):
        return "word of code"
    if core.isalpha():
        if core[0].isupper():
            return "capital letter first"
        return "small word" if text[0].isspace() else "piece of a word"
    if core.isdigit():
        return "digit"
    if all(character in ".,;:!?'\"-—–’‘“”…" for character in core):
        return "punctuation"
    return "other" if any(map(str.isalnum, core)) or not core.isprintable() or "�" in core else "sign, bracket"


class Routing:
    """Which experts were chosen for which token, in each Mixture of Experts."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer) -> None:
        self.layers, self.tokenizer = list(model.moe_layers()), tokenizer
        shape = (len(self.layers), tokenizer.vocab_size, model.config.n_routed_experts)
        self.counts = torch.zeros(shape, dtype=torch.int64)  # (layers, V, E)
        self.unsteered = torch.zeros_like(self.counts)  # as it would be without the balancing bias
        self.halves = [torch.zeros_like(self.counts) for _ in range(2)]  # of every other batch

    @torch.inference_mode()
    def read(self, model: Transformer, batches: Iterable[Batch]) -> "Routing":
        for number, batch in enumerate(batches):
            tokens = batch.tokens.flatten()

            def note(layer: int, x: Tensor, *_: object, tokens: Tensor = tokens, number: int = number) -> None:
                for steered in (True, False):
                    chosen = choices(self.layers[layer], x, steered=steered)  # (N, E) 0 or 1
                    for counts in (self.counts, self.halves[number % 2]) if steered else (self.unsteered,):
                        counts[layer].index_add_(0, tokens, chosen)

            with entering(self.layers, note):
                model.trunk(batch.tokens)
        return self

    def facts(self) -> Facts:
        """Loads by kind of token, with and without the bias, and how far the token alone decides; by layer."""
        texts = [self.tokenizer.bytes_of(token).decode(errors="replace") for token in range(self.counts.shape[1])]
        kinds = [kind_of(text) for text in texts]
        names = [kind for kind, _ in Counter(kinds).most_common()]
        kind = torch.tensor([names.index(each) for each in kinds])
        by_kind = torch.zeros(len(self.layers), len(names), self.counts.shape[2], dtype=torch.int64)
        by_kind.index_add_(1, kind, self.counts)
        return {
            "load": shares(self.counts.sum(1)),
            "load_without_bias": shares(self.unsteered.sum(1)),
            "bias": [layer.balance_bias.tolist() for layer in self.layers],
            "kinds": {
                name: {"tokens": int(by_kind[0, row].sum()), "shares": shares(by_kind[:, row])}
                for row, name in enumerate(names)
                if by_kind[0, row].sum() > 0
            },
            "guessed": self.guessed(),
            "tokens": [self.extremes(layer, texts) for layer in range(len(self.layers))],
        }

    def guessed(self) -> list[dict[str, float]]:
        """How often the expert is guessed in one half of the text from what was seen in the other half, by layer.

        most: always the busiest expert; token: the one that took this token most often (once seen), else the busiest.
        """
        found = []
        for seen, asked in zip(*self.halves, strict=True):  # (V, E)
            busiest = int(seen.sum(0).argmax())
            favourite = torch.where(seen.sum(-1) > 0, seen.argmax(-1), busiest)
            right = asked.gather(-1, favourite[:, None]).sum()
            found.append({"most": float(asked[:, busiest].sum() / asked.sum()), "token": float(right / asked.sum())})
        return found

    def extremes(self, layer: int, texts: Sequence[str], most: int = 14) -> list[list[str]]:
        """Of each expert the tokens that it took most decidedly, the commonest first among equals."""
        counts = self.counts[layer].double()  # (V, E)
        total = counts.sum(-1)
        lists = []
        for expert in range(counts.shape[1]):
            share = torch.where(total >= OFTEN, counts[:, expert] / total.clamp(min=1), -1)
            order = (share + total / total.max() * 1e-3).argsort(descending=True)[:most].tolist()
            lists.append([texts[token] for token in order])
        return lists


def choices(layer: MoE, x: Tensor, *, steered: bool) -> Tensor:
    """1 where an expert is chosen for a token, with the balancing bias or without: x (B, T, D) to (N, E) int64."""
    c = layer.config
    bias = layer.balance_bias if steered else torch.zeros_like(layer.balance_bias)
    experts, _, scores = route(x.flatten(0, 1), layer.centroids, bias, c.experts_per_token, c.norm_topk_prob)
    return torch.zeros_like(scores, dtype=torch.int64).scatter(1, experts, 1)


def shares(counts: Tensor) -> list[Any]:
    """Counts (..., E) as shares that sum to 1 (all 0 where nothing was counted)."""
    return (counts.double() / counts.sum(-1, keepdim=True).clamp(min=1)).tolist()
