"""Pictures of docs/concepts/attention.md: what the cache takes, what that costs, and where the heads look."""

from statistics import fmean

from docs.figures.charts import Panel, heat_map, legend
from docs.figures.facts import measured, presets, result, source
from docs.figures.picture import Picture
from nanollm.report.charts import Scale

SPEED = "2026-11-23_2-cores_inference"
SITUATIONS = ("one reply", "8 rows after 512 tokens", "64 rows after 512 tokens")
ENGINES = ("transformers", "transformers, expanded", "nanollm")
ENGINE_NAMES = ("latents, expanded anew", "keys and values kept", "latents, absorbed")
# row of docs/ablations.md: name, numbers kept per token and block (nano-5m)
ROWS = {"muon": ("MLA", 64 + 32), "gqa": ("GQA", 2 * 2 * 58), "mha": ("MHA", 2 * 4 * 44)}
BLOCKS_5M = 8
HABITS = {
    "first": "the first token",
    "before": "the token before",
    "itself": "the token itself",
    "repeat": "behind a repetition",
}


def cache() -> Picture:
    """Of each preset the bytes per token: latents, and the keys and values that they stand for."""
    picture = Picture(720, 360, "Cache per token in bytes: latents of MLA against keys and values of the same heads")
    scale, left = Scale(400, 200_000, 130, 560, log=True), 130
    legend(picture, left, 22, ["latents (MLA)", "keys and values of as many heads"], swatch=True)
    for tick in (1000, 10_000, 100_000):
        picture.line((scale.place(tick), 42), (scale.place(tick), 306), style="grid")
        picture.text(scale.place(tick), 320, f"{tick:,}", "soft")
    for row, (name, c) in enumerate(presets().items()):
        y = 64 + 42 * row
        latents = 2 * c.n_blocks * c.cache_width
        full = 2 * c.n_blocks * c.n_heads * (c.qk_head_dim + c.v_head_dim)
        picture.text(left - 10, y, name, "ink strong", "end")
        picture.line((scale.place(latents), y), (scale.place(full), y), style="line")
        for series, value in enumerate((latents, full)):
            picture.dot(scale.place(value), y, f"fill{series}", 6)
            picture.text(scale.place(value), y - 15, f"{value:,}", "ink small")
        picture.text(590, y, f"{full / latents:.1f} times fewer", "ink", "start")
    picture.text(345, 341, "bytes per token in bfloat16, logarithmic", "soft")
    return picture


def trade() -> Picture:
    """What a small cache costs in bits per byte, and how fast it is."""
    picture = Picture(720, 370, "What attention learns for the cache it needs, and how fast it decodes")
    left = Panel.draw(
        picture,
        (60, 70, 220, 190),
        (0, 3200),
        (2.62, 2.76),
        title="Equal parameters, equal text",
        x_unit="numbers kept per token",
        y_unit="bits per byte",
        most=4,
    )
    for series, (row, (name, width)) in enumerate(ROWS.items()):
        bits = [result(f"ablations/{row}_{seed}")["bits_per_byte"] for seed in range(3)]
        numbers = BLOCKS_5M * width
        left.dots([numbers] * 3, bits, series, 3)
        at, middle = left.x.place(numbers), left.y.place(fmean(bits))
        picture.line((at - 12, middle), (at + 12, middle), style=f"curve curve{series}")
        picture.text(left.x.place(numbers), left.y.place(max(bits)) - 14, name, "ink strong")
    picture.text(60, 314, "nano-5m, three seeds and their mean", "soft small", "start")
    record = result(SPEED)
    right = Panel.draw(
        picture,
        (400, 70, 300, 190),
        (-0.4, 2.4),
        (5, 500),
        title="Decoding",
        x_unit="replies at once",
        y_unit="tokens/s of all replies, logarithmic",
        x_names=("1", "8", "64"),
        log=True,
    )
    for series, engine in enumerate(ENGINES):
        for at, situation in enumerate(SITUATIONS):
            speeds = record[situation]["tokens_per_s"]
            if engine in speeds:
                x = at + 0.16 * (series - 1)
                right.whisker(x, speeds[engine]["least"], speeds[engine]["greatest"], series)
                right.dots([x], [speeds[engine]["median"]], series, 5)
                figure = f"{speeds[engine]['median']:.0f}"
                picture.text(
                    right.x.place(x) + 8, right.y.place(speeds[engine]["median"]), figure, "ink small", "start"
                )
    for series, name in enumerate(ENGINE_NAMES):
        picture.dot(406, 314 + 17 * series, f"fill{series}", 5)
        engine = "nanollm" if series == 2 else "transformers"
        picture.text(418, 314 + 17 * series, f"{name} ({engine})", "soft small", "start")
    return picture


def heads() -> Picture:
    """How much of its attention each head gives to four places."""
    facts = measured("attention")
    found = facts["heads"]
    n_blocks, n_heads = len(found["first"]), len(found["first"][0])
    cell = 150 / n_heads
    picture = Picture(
        720, 126 + 24 * n_blocks, "Share of the attention of every head that goes to four places, percent"
    )
    for number, (habit, name) in enumerate(HABITS.items()):
        left, top = 66 + 166 * number, 54
        picture.text(left + 75, 20, name, "ink strong")
        for head in range(n_heads):
            picture.text(left + cell * (head + 0.5), 42, f"{head + 1}", "soft small")
        heat_map(picture, (left, top, cell, 24), found[habit], tell=lambda share: f"{100 * share:.0f}")
    for block in range(n_blocks):
        picture.text(56, 54 + 24 * block + 12, f"{block + 1}", "soft small", "end")
    picture.text(22, 54 + 12 * n_blocks, "block", "soft", turned=True)
    below = 54 + 24 * n_blocks
    picture.text(
        393, below + 18, "head 1 to 6 of each block; percent of its attention".replace("6", str(n_heads)), "soft"
    )
    told = f"{facts['documents']} held-out documents of {facts['document_tokens']} tokens"
    picture.text(360, below + 50, f"{source(facts)}; {told}", "soft small")
    return picture


def patterns() -> Picture:
    """What four heads look at in a sentence; a row is a token, its cells the tokens that it looks at."""
    facts = measured("attention")
    tokens = [text.strip() or text for text in facts["sentence"]["tokens"]]
    cell = 13.0
    size = cell * len(tokens)
    picture = Picture(720, int(2 * (size + 108) + 24), "What four heads look at in a sentence")
    for number, (habit, name) in enumerate(HABITS.items()):
        shown = facts["sentence"]["shown"][habit]
        left, top = 74 + 356 * (number % 2), 50 + (size + 108) * (number // 2)
        picture.text(left, top - 32, f"Block {shown['block']}, head {shown['head']}", "ink strong", "start")
        picture.text(left, top - 14, f"{name}: {100 * shown['share']:.0f} % in documents", "soft", "start")
        heat_map(picture, (left, top, cell, cell), [[weight / 100 for weight in row] for row in shown["percent"]])
        for at, token in enumerate(tokens):
            picture.text(left - 6, top + cell * (at + 0.5), token, "soft small", "end")
            picture.text(left + cell * (at + 0.5), top + size + 6, token, "soft small", "end", turned=True)
    told = "a row is a token, its cells are the tokens that it looks at"
    picture.text(360, picture.height - 14, f"{source(facts)}; {told}", "soft small")
    return picture
