"""How is the model built, and what becomes what?  Pictures of boxes and arrows.

The sizes are those of a model preset, so a picture cannot disagree with the model.
"""

from itertools import pairwise

from docs.figures.picture import Picture
from nanollm.model.config import ModelConfig
from nanollm.settings import load_preset

PRESET = "nano-327m"
LEFT = 182  # of everything beside the stack


def architecture() -> Picture:
    """The stack of blocks, one block of each kind, and the attention with its latents."""
    c = ModelConfig(**load_preset("model", PRESET))
    picture = Picture(
        780, 620, f"The architecture of {PRESET}: {c.n_blocks} blocks of latent attention and SwiGLU or experts"
    )
    stack(picture, c)
    dense = [i + 1 for i in range(c.n_blocks) if not c.is_moe(i)]
    moe = [i + 1 for i in range(c.n_blocks) if c.is_moe(i)]
    block(picture, 40, f"A dense block: {len(dense)} of {c.n_blocks}")
    picture.box(582, 68, 134, 56, "dense", "SwiGLU", f"{c.d_model:,} → {c.d_ff:,} → {c.d_model:,}")
    block(picture, 190, f"A block with a Mixture of Experts: {', '.join(map(str, moe))}")
    experts(picture, c)
    attention(picture, c, 378)
    return picture


def stack(picture: Picture, c: ModelConfig) -> None:
    """Tokens at the bottom, logits at the top, every block in between."""
    x, w, step = 14, 146, 22
    top = 116
    bottom = top + step * c.n_blocks
    picture.text(x + w / 2, 22, PRESET, "ink title")
    picture.text(x + w / 2, 43, f"{c.total_parameters / 1e6:.0f} million parameters", "soft")
    picture.box(x, 62, w, 24, "plain", f"head {c.d_model:,} × {c.vocab_size:,}")
    picture.text(x + w / 2, 100, "RMSNorm", "soft")
    for i in range(c.n_blocks):
        kind = "expert" if c.is_moe(i) else "dense"
        y = bottom - step * (i + 1)
        picture.box(x, y, w, step - 5, kind)
        picture.text(x + w / 2, y + (step - 5) / 2, f"{i + 1}", "ink")
    picture.box(x, bottom + 2, w, 40, "plain", "embedding", f"{c.vocab_size:,} × {c.d_model:,}")
    picture.text(x + w / 2, bottom + 54, f"up to {c.context_length:,} tokens", "soft")


def block(picture: Picture, y: float, title: str) -> None:
    """The parts that every block has, from left to right; the box of its second half is drawn by the caller."""
    middle = y + 56
    picture.text(LEFT, y - 16, title, "ink title", "start")
    picture.text(LEFT, middle, "hidden", "soft", "start")
    picture.arrow((226, middle), (252, middle))
    picture.box(252, middle - 17, 76, 34, "plain", "RMSNorm")
    picture.arrow((328, middle), (344, middle))
    picture.box(344, middle - 28, 104, 56, "attention", "MLA", "latent attention")
    picture.arrow((448, middle), (460, middle))
    picture.plus(469, middle)
    picture.arrow((478, middle), (496, middle))
    picture.box(496, middle - 17, 76, 34, "plain", "RMSNorm")
    picture.line((572, middle), (582, middle))
    picture.arrow((716, middle), (726, middle))
    picture.plus(735, middle)
    picture.arrow((744, middle), (770, middle))
    over = y + 10
    picture.arrow((238, middle), (238, over), (469, over), (469, middle - 9))
    picture.arrow((486, middle), (486, over), (735, over), (735, middle - 9))


def experts(picture: Picture, c: ModelConfig) -> None:
    """The second half of a block with experts: the router chooses, the shared ones always answer."""
    picture.box(582, 208, 134, 132, "plain")
    picture.text(649, 223, f"router: top {c.experts_per_token} of {c.n_routed_experts}", "soft")
    width = 126 / max(c.n_routed_experts, c.n_shared_experts)
    for row, (name, count) in enumerate((("routed", c.n_routed_experts), ("shared", c.n_shared_experts))):
        for i in range(count):
            picture.box(586 + i * width + 2, 236 + row * 44, width - 4, 38, "expert", name, f"{c.d_expert:,}")
    picture.text(649, 330, "answers summed", "soft")


def attention(picture: Picture, c: ModelConfig, y: float) -> None:
    """From the hidden state to the output of the attention, through two latents and one shared rotary key."""
    q, kv, key = y + 40, y + 106, y + 186
    picture.text(LEFT, y - 2, "MLA: Multi-Head Latent Attention", "ink title", "start")
    picture.box(LEFT, kv - 24, 62, 48, "plain", "hidden", f"{c.d_model:,}")
    for target in (q, key):
        picture.arrow((244, kv), (256, kv), (256, target), (270, target))
    picture.arrow((244, kv), (270, kv))
    picture.box(270, q - 24, 146, 48, "plain", "query latent", f"{c.q_lora_rank}, RMSNorm")
    picture.box(270, kv - 24, 146, 48, "cached", "key-value latent", f"{c.kv_lora_rank}, RMSNorm")
    picture.box(270, key - 24, 146, 48, "cached", "rotary key", f"{c.qk_rope_head_dim}, one for all heads")
    picture.arrow((416, q), (444, q))
    parts = f"{c.qk_nope_head_dim} content + {c.qk_rope_head_dim} rotary"
    picture.box(444, q - 24, 150, 48, "attention", f"queries {c.n_heads} × {c.qk_head_dim}", parts)
    picture.arrow((416, kv), (428, kv), (428, kv - 6), (444, kv - 6))
    picture.arrow((416, kv), (428, kv), (428, kv + 34), (444, kv + 34))
    picture.box(444, kv - 22, 150, 30, "attention", f"keys {c.n_heads} × {c.qk_nope_head_dim}")
    picture.box(444, kv + 19, 150, 30, "attention", f"values {c.n_heads} × {c.v_head_dim}")
    for source in (q, kv - 6, kv + 34):
        picture.line((594, source), (606, source), (606, kv))
    picture.line((416, key), (606, key), (606, kv))
    picture.arrow((606, kv), (622, kv))
    picture.box(622, kv - 28, 92, 56, "attention", "attend", "softmax")
    picture.line((714, kv), (724, kv))
    picture.box(724, kv - 24, 46, 48, "plain", "out", f"{c.d_model:,}")
    picture.box(270, key + 34, 16, 16, "cached")
    cached = f"the cache: {c.kv_lora_rank} + {c.qk_rope_head_dim} = {c.cache_width} numbers per token and block"
    picture.text(294, key + 42, cached, "ink", "start")


# --- the journey ---

STOPS = (
    ("text", "documents,", "conversations", ""),
    ("tokens", "train-00000.npy", "manifest.json", ""),
    ("batches", "tokens (B, T)", "targets (B, T)", ""),
    ("loss", "sum and count,", "bits per byte", ""),
    ("weights", "checkpoints/", "metrics.jsonl", ""),
    ("bundle", "weights,", "tokenizer,", "provenance"),
    ("replies", "text", "", ""),
)
ROOMS = ("sources/ text/", "data/", "model/ train/", "train/", "bundle.py", "generate/")
VERBS = ((0, 1, "tokenizer", "preprocess"), (1, 5, "pretrain"), (5, 6, "generate"))  # first stop, last stop, names


def flow() -> Picture:
    """What becomes what, in which file, by which verb."""
    picture = Picture(780, 240, "From text to replies: what becomes what, where, and by which command")
    width, gap, left, y = 78, 34, 15, 58
    centre = [left + width / 2 + i * (width + gap) for i in range(len(STOPS))]
    kinds = ("plain", "attention", "attention", "dense", "dense", "cached", "plain")
    for x, kind, (name, *forms) in zip(centre, kinds, STOPS, strict=True):
        picture.box(x - width / 2, y - 20, width, 40, kind, name)
        for row, form in enumerate(forms):
            picture.text(x, y + 36 + 16 * row, form, "soft")
    for (x, after), room in zip(pairwise(centre), ROOMS, strict=True):
        picture.arrow((x + width / 2 + 3, y), (after - width / 2 - 3, y))
        picture.text((x + after) / 2, y - 38, room, "soft code")
    half = width / 2
    for first, last, *verbs in VERBS:
        a, b = centre[first] + (12 if first else -half), centre[last] + (-12 if last < len(STOPS) - 1 else half)
        picture.line((a, 146), (a, 154), (b, 154), (b, 146))
        for row, verb in enumerate(verbs):
            picture.text((a + b) / 2, 170 + 17 * row, f"nanollm {verb}", "ink strong code")
    a, b = centre[0] - half, centre[-1] + half
    picture.line((a, 204), (a, 212), (b, 212), (b, 204))
    picture.text((a + b) / 2, 227, "nanollm demo", "ink strong code")
    return picture
