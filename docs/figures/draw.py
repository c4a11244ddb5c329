"""Draw the pictures of the README: `python docs/figures/draw.py` (with --check: compare instead of writing).

Plain SVG text that follows the reader's light or dark scheme. The sizes are those of a model preset, so a picture
cannot disagree with the model.
"""

import sys
from html import escape
from itertools import pairwise
from pathlib import Path

from nanollm.model.config import ModelConfig
from nanollm.settings import load_preset

HERE = Path(__file__).parent
PRESET = "nano-327m"

# class: (light fill, light stroke, dark fill, dark stroke)
COLOURS = {
    "plain": ("#f6f8fa", "#afb8c1", "#21262d", "#59636e"),
    "attention": ("#ddf4ff", "#218bff", "#0c2d4d", "#4493f8"),
    "dense": ("#dafbe1", "#2da44e", "#12361f", "#3fb950"),
    "expert": ("#fff1d6", "#d4a72c", "#3d2e08", "#d29922"),
    "cached": ("#fbefff", "#a475f9", "#321f57", "#ab7df8"),
}
INK = {"ink": ("#1f2328", "#e6edf3"), "soft": ("#59636e", "#9198a1")}
LINE = ("#6e7781", "#8b949e")
FONT = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, 'DejaVu Sans', sans-serif"
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"


class Picture:
    """Shapes on a canvas; x grows to the right and y downwards, in pixels."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self.shapes: list[str] = []

    def box(self, x: float, y: float, w: float, h: float, kind: str, *lines: str) -> None:
        """A rounded box; the first line of its text is strong, the others are soft."""
        self.shapes.append(f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="7"/>')
        top = y + h / 2 - 7.5 * (len(lines) - 1)
        for i, line in enumerate(lines):
            self.text(x + w / 2, top + 15 * i, line, "ink strong" if i == 0 else "soft")

    def text(self, x: float, y: float, words: str, style: str = "ink", anchor: str = "middle") -> None:
        """Words whose middle is at height y."""
        self.shapes.append(
            f'<text class="{style}" x="{x:g}" y="{y + 4:g}" text-anchor="{anchor}">{escape(words)}</text>'
        )

    def line(self, *points: tuple[float, float], style: str = "line") -> None:
        path = " L".join(f"{x:g} {y:g}" for x, y in points)
        self.shapes.append(f'<path class="{style}" d="M{path}"/>')

    def arrow(self, *points: tuple[float, float]) -> None:
        """A line along the points, with a head at the last one."""
        (x0, y0), (x, y) = points[-2:]
        dx, dy = (x > x0) - (x < x0), (y > y0) - (y < y0)
        self.line(*points[:-1], (x - 5 * dx, y - 5 * dy))
        left, right = (x - 7 * dx - 4 * dy, y - 7 * dy - 4 * dx), (x - 7 * dx + 4 * dy, y - 7 * dy + 4 * dx)
        corners = " ".join(f"{px:g},{py:g}" for px, py in ((x, y), left, right))
        self.shapes.append(f'<polygon class="head" points="{corners}"/>')

    def plus(self, x: float, y: float) -> None:
        """The sum of a branch and the residual stream."""
        self.shapes.append(f'<circle class="plain" cx="{x:g}" cy="{y:g}" r="9"/>')
        self.line((x - 4, y), (x + 4, y))
        self.line((x, y - 4), (x, y + 4))

    def svg(self) -> str:
        size = f'viewBox="0 0 {self.width} {self.height}" width="{self.width}" height="{self.height}"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{escape(self.title)}">'
        return "\n".join([head, f"<title>{escape(self.title)}</title>", style(), *self.shapes, "</svg>"]) + "\n"


def style() -> str:
    """Colours of both schemes, and the text sizes."""
    light = [f".{name} {{ fill: {c[0]}; stroke: {c[1]} }}" for name, c in COLOURS.items()]
    dark = [f".{name} {{ fill: {c[2]}; stroke: {c[3]} }}" for name, c in COLOURS.items()]
    light += [f".{name} {{ fill: {c[0]} }}" for name, c in INK.items()]
    dark += [f".{name} {{ fill: {c[1]} }}" for name, c in INK.items()]
    light += [f".line {{ fill: none; stroke: {LINE[0]}; stroke-width: 1.5 }}", f".head {{ fill: {LINE[0]} }}"]
    dark += [f".line {{ stroke: {LINE[1]} }}", f".head {{ fill: {LINE[1]} }}"]
    sizes = [
        f"text {{ font: 12px {FONT} }}",
        ".strong { font-weight: 600 }",
        ".title { font-size: 14px; font-weight: 600 }",
        f".code {{ font-family: {MONO} }}",
    ]
    scheme = "@media (prefers-color-scheme: dark) {"
    return "\n".join(["<style>", *sizes, *light, scheme, *dark, "}", "</style>"])


# The model


def architecture(c: ModelConfig) -> Picture:
    """The stack of blocks, one block of each kind, and the attention with its latents."""
    picture = Picture(
        1000, 640, f"The architecture of {PRESET}: {c.n_blocks} blocks of latent attention and SwiGLU or experts"
    )
    stack(picture, c)
    dense = [i + 1 for i in range(c.n_blocks) if not c.is_moe(i)]
    moe = [i + 1 for i in range(c.n_blocks) if c.is_moe(i)]
    block(picture, 36, f"A dense block: {len(dense)} of {c.n_blocks}")
    picture.box(708, 64, 176, 56, "dense", "SwiGLU", f"{c.d_model:,} → {c.d_ff:,} → {c.d_model:,}")
    block(picture, 196, f"A block with a Mixture of Experts: {', '.join(map(str, moe))}")
    experts(picture, c)
    attention(picture, c, 392)
    return picture


def stack(picture: Picture, c: ModelConfig) -> None:
    """Tokens at the bottom, logits at the top, every block in between."""
    x, w, step = 14, 188, 22
    top = 116
    bottom = top + step * c.n_blocks
    picture.text(x + w / 2, 18, PRESET, "ink title")
    picture.text(x + w / 2, 40, f"{c.total_parameters / 1e6:.0f} million parameters", "soft")
    picture.box(x, 62, w, 24, "plain", f"head: {c.d_model:,} × {c.vocab_size:,}")
    picture.text(x + w / 2, 100, "RMSNorm", "soft")
    for i in range(c.n_blocks):
        kind = "expert" if c.is_moe(i) else "dense"
        y = bottom - step * (i + 1)
        picture.box(x, y, w, step - 5, kind)
        picture.text(x + w / 2, y + (step - 5) / 2, f"{i + 1}", "ink")
    picture.box(x, bottom + 4, w, 24, "plain", f"embedding: {c.vocab_size:,} × {c.d_model:,}")
    picture.text(x + w / 2, bottom + 46, f"up to {c.context_length:,} tokens", "soft")


def block(picture: Picture, y: float, title: str) -> None:
    """The parts that every block has, from left to right; the box of its second half is drawn by the caller."""
    middle = y + 56
    picture.text(240, y - 18, title, "ink title", "start")
    picture.text(240, middle, "hidden", "soft", "start")
    picture.arrow((286, middle), (316, middle))
    picture.box(316, middle - 17, 78, 34, "plain", "RMSNorm")
    picture.arrow((394, middle), (418, middle))
    picture.box(418, middle - 28, 128, 56, "attention", "MLA", "latent attention")
    picture.arrow((546, middle), (569, middle))
    picture.plus(578, middle)
    picture.arrow((587, middle), (612, middle))
    picture.box(612, middle - 17, 78, 34, "plain", "RMSNorm")
    picture.arrow((690, middle), (708, middle))
    picture.plus(914, middle)
    picture.arrow((884, middle), (905, middle))
    picture.arrow((923, middle), (976, middle))
    over = y + 8
    picture.arrow((300, middle), (300, over), (578, over), (578, middle - 9))
    picture.arrow((599, middle), (599, over), (914, over), (914, middle - 9))


def experts(picture: Picture, c: ModelConfig) -> None:
    """The second half of a block with experts: the router chooses, the shared ones always answer."""
    picture.box(708, 214, 176, 132, "plain")
    picture.text(796, 229, f"router: top {c.experts_per_token} of {c.n_routed_experts}", "soft")
    width = 160 / max(c.n_routed_experts, c.n_shared_experts)
    for row, (name, count) in enumerate((("routed", c.n_routed_experts), ("shared", c.n_shared_experts))):
        for i in range(count):
            picture.box(716 + i * width + 2, 242 + row * 44, width - 4, 38, "expert", name, f"{c.d_expert:,}")
    picture.text(796, 336, "answers are summed", "soft")


def attention(picture: Picture, c: ModelConfig, y: float) -> None:
    """From the hidden state to the output of the attention, through two latents and one shared rotary key."""
    q, kv, key = y + 40, y + 106, y + 190
    picture.text(240, y - 2, "MLA: Multi-Head Latent Attention", "ink title", "start")
    picture.box(240, kv - 28, 84, 56, "plain", "hidden", f"{c.d_model:,}")
    for target in (q, key):
        picture.arrow((324, kv), (342, kv), (342, target), (364, target))
    picture.arrow((324, kv), (364, kv))
    picture.box(364, q - 24, 152, 48, "plain", f"query latent  {c.q_lora_rank}", "RMSNorm")
    picture.box(364, kv - 24, 152, 48, "cached", f"key-value latent  {c.kv_lora_rank}", "RMSNorm")
    picture.box(364, key - 24, 152, 48, "cached", f"rotary key  {c.qk_rope_head_dim}", "shared by all heads")
    picture.arrow((516, q), (548, q))
    picture.box(
        548,
        q - 24,
        172,
        48,
        "attention",
        f"queries  {c.n_heads} × ({c.qk_nope_head_dim} + {c.qk_rope_head_dim})",
        "content + rotary",
    )
    picture.arrow((516, kv), (530, kv), (530, kv - 6), (548, kv - 6))
    picture.arrow((516, kv), (530, kv), (530, kv + 36), (548, kv + 36))
    picture.box(548, kv - 22, 172, 30, "attention", f"keys  {c.n_heads} × {c.qk_nope_head_dim}")
    picture.box(548, kv + 21, 172, 30, "attention", f"values  {c.n_heads} × {c.v_head_dim}")
    for source in (q, kv - 6, kv + 36):
        picture.line((720, source), (744, source), (744, kv))
    picture.line((516, key), (744, key), (744, kv))
    picture.arrow((744, kv), (768, kv))
    picture.box(768, kv - 30, 106, 60, "attention", "attend", "causal softmax")
    picture.arrow((874, kv), (896, kv))
    picture.box(896, kv - 24, 80, 48, "plain", "output", f"→ {c.d_model:,}")
    picture.box(364, key + 34, 16, 16, "cached")
    cached = f"the cache: {c.kv_lora_rank} + {c.qk_rope_head_dim} = {c.cache_width} numbers per token and block"
    picture.text(388, key + 42, cached, "ink", "start")


# The journey

STOPS = (
    ("text", "documents,", "conversations"),
    ("tokens", "train-00000.npy", "manifest.json"),
    ("batches", "tokens (B, T)", "targets (B, T)"),
    ("loss", "sum and count,", "bits per byte"),
    ("weights", "checkpoints/", "metrics.jsonl"),
    ("bundle", "weights, tokenizer,", "config, provenance"),
    ("replies", "text", ""),
)
ROOMS = ("sources/  text/", "data/", "model/  train/", "train/", "bundle.py", "generate/")
VERBS = ((0, 1, "tokenizer", "preprocess"), (1, 5, "pretrain"), (5, 6, "generate"))  # first stop, last stop, names


def flow() -> Picture:
    """What becomes what, in which file, by which verb."""
    picture = Picture(1000, 226, "From text to replies: what becomes what, where, and by which command")
    width, gap, left, y = 100, 44, 18, 64
    centre = [left + width / 2 + i * (width + gap) for i in range(len(STOPS))]
    kinds = ("plain", "attention", "attention", "dense", "dense", "cached", "plain")
    for x, kind, (name, *forms) in zip(centre, kinds, STOPS, strict=True):
        picture.box(x - width / 2, y - 20, width, 40, kind, name)
        for row, form in enumerate(forms):
            picture.text(x, y + 36 + 16 * row, form, "soft")
    for (x, after), room in zip(pairwise(centre), ROOMS, strict=True):
        picture.arrow((x + width / 2 + 3, y), (after - width / 2 - 3, y))
        picture.text((x + after) / 2, y - 40, room, "soft code")
    for first, last, *verbs in VERBS:
        a, b = centre[first] + 12 * (first > 0) - 50 * (first == 0), centre[last] - 12 * (last < 6) + 50 * (last == 6)
        picture.line((a, 136), (a, 144), (b, 144), (b, 136))
        for row, verb in enumerate(verbs):
            picture.text((a + b) / 2, 160 + 17 * row, f"nanollm {verb}", "ink strong code")
    picture.line((18, 192), (18, 200), (982, 200), (982, 192))
    picture.text(500, 215, "nanollm demo", "ink strong code")
    return picture


def main(words: list[str]) -> int:
    pictures = {"architecture": architecture(ModelConfig(**load_preset("model", PRESET))), "flow": flow()}
    stale = []
    for name, picture in pictures.items():
        file = HERE / f"{name}.svg"
        if "--check" in words:
            stale += [] if file.exists() and file.read_text(encoding="utf-8") == picture.svg() else [file.name]
        else:
            file.write_text(picture.svg(), encoding="utf-8", newline="\n")
    if stale:
        print(f"{', '.join(stale)}: not what the script draws; run python docs/figures/draw.py", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
