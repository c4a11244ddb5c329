"""Pictures of docs/concepts/architecture.md: where the parameters are, and what happens to the residual stream."""

from docs.figures.charts import Panel, ink_on, legend, up_to
from docs.figures.facts import measured, presets, source
from docs.figures.picture import Picture
from nanollm.model.config import ModelConfig

PARTS = ("embedding, head", "attention", "dense SwiGLU", "experts used", "experts idle")
COLOURS = ((4, 1.0), (0, 1.0), (2, 1.0), (1, 1.0), (1, 0.45))  # series and opacity of each part


def parts_of(c: ModelConfig) -> tuple[int, ...]:
    """Parameters of each of PARTS for one token; the norms of a block count to its attention, the router to experts."""
    idle = c.n_moe_blocks * (c.n_routed_experts - c.experts_per_token) * c.expert_parameters
    attention = c.n_blocks * (c.attention_parameters + 2 * c.d_model) + c.d_model
    dense = (c.n_blocks - c.n_moe_blocks) * 3 * c.d_model * c.d_ff
    ends = 2 * c.vocab_size * c.d_model
    used = (c.experts_per_token + c.n_shared_experts) * c.expert_parameters + c.n_routed_experts * c.d_model
    return ends, attention, dense, c.n_moe_blocks * used, idle


def parameters() -> Picture:
    """Of each preset the share of its parameters in each part."""
    picture = Picture(720, 330, "Share of the parameters in each part of the presets, in percent")
    x = 20.0
    for name, (series, opacity) in zip(PARTS, COLOURS, strict=True):
        picture.rect(x, 16, 12, 12, f"fill{series}", round_by=2, opacity=opacity)
        picture.text(x + 18, 22, name, "ink", "start")
        x += 46 + 6.6 * len(name)
    left, width = 124, 430
    for row, (name, c) in enumerate(presets().items()):
        y, at = 58 + 42 * row, float(left)
        picture.text(left - 10, y, name, "ink strong", "end")
        for count, (series, opacity) in zip(parts_of(c), COLOURS, strict=True):
            share = count / c.total_parameters
            picture.rect(at, y - 13, width * share - 1, 26, f"fill{series}", opacity=opacity)
            if share > 0.055:
                picture.text(at + width * share / 2, y, f"{100 * share:.0f} %", f"{ink_on(series, opacity)} small")
            at += width * share
        picture.text(left + width + 8, y - 8, f"{c.total_parameters / 1e6:.1f} million", "ink", "start")
        picture.text(left + width + 8, y + 8, f"{c.active_parameters / 1e6:.1f} million active", "soft", "start")
    picture.text(left + width / 2, 310, "share of all parameters, percent", "soft")
    return picture


def residual() -> Picture:
    """Three panels over the blocks: size of the stream, size of what is added, what could be said already."""
    facts = measured("residual")
    n_blocks = len(facts["blocks"])
    last = (0, n_blocks)
    picture = Picture(720, 330, "The residual stream block by block: its size, what each block adds, bits per byte")
    blocks, stops = list(range(1, n_blocks + 1)), list(range(n_blocks + 1))
    stream = facts["stream_rms"]
    size = Panel.draw(
        picture,
        (50, 70, 170, 180),
        last,
        up_to([each["high"] for each in stream]),
        title="The stream",
        x_unit="after block (0: embedding)",
        y_unit="root mean square",
    )
    size.band(stops, [each["low"] for each in stream], [each["high"] for each in stream], 0)
    size.curve(stops, [each["median"] for each in stream], 0)
    size.dots(stops, [each["median"] for each in stream], 0)
    picture.text(64, 82, "band: nine in ten tokens", "soft small", "start")
    adds = [[each["median"] for each in facts[name]] for name in ("attention_rms", "ffn_rms")]
    added = Panel.draw(
        picture,
        (290, 70, 170, 180),
        (1, n_blocks),
        up_to([1.2 * max(map(max, adds))]),
        title="What a block adds to it",
        x_unit="block",
        y_unit="root mean square, median",
    )
    for series, values in enumerate(adds):
        added.curve(blocks, values, series)
        added.dots(blocks, values, series)
    legend(picture, 296, 80, ["attention", "SwiGLU"])
    moe = [number for number, kind in zip(blocks, facts["blocks"], strict=True) if kind == "experts"]
    for block in moe:
        picture.text(added.x.place(block), added.y.start - 9, "MoE", "soft small")
    bits = facts["bits_per_byte"]
    said = Panel.draw(
        picture,
        (530, 70, 170, 180),
        last,
        (0.98 * min(bits), 1.01 * max(bits)),
        title="If it spoke there",
        x_unit="after block (0: embedding)",
        y_unit="bits per byte",
    )
    said.curve(stops, bits, 3)
    said.dots(stops, bits, 3)
    picture.text(360, 314, f"{source(facts)}; {facts['tokens']:,} tokens of held-out text", "soft small")
    return picture
