"""Pictures of docs/concepts/experts.md: who gets how much, who gets what, and what decides it."""

from docs.figures.charts import Panel, heat_map, ink_on, legend
from docs.figures.facts import measured, source
from docs.figures.picture import Picture
from nanollm.report.charts import smoothed


def expert_load() -> Picture:
    """Share of the tokens that each expert got, and the bias of its router, over the steps of a run."""
    facts = measured("training")
    blocks, n_experts = facts["blocks"], len(facts["load"][0][0])
    picture = Picture(720, 560, "Load of each expert and bias of the router over the steps of pretraining")
    last = (0, facts["steps"][-1])
    legend(picture, 60, 22, [f"expert {number + 1}" for number in range(n_experts)])
    reach = 1.2 * max(abs(value) for row in facts["bias"].values() for each in row for value in each)
    bias_steps = [0, *map(int, facts["bias"])]
    for column, block in enumerate(blocks[:2]):
        left = 60 + 352 * column
        share = Panel.draw(
            picture,
            (left, 86, 290, 160),
            last,
            (0, 1),
            title=f"Block {block}: load",
            x_unit="step",
            y_unit="share of the step's tokens; dotted: equal shares",
        )
        share.level(1 / n_experts)
        biases = [[0.0] * n_experts, *(each[column] for each in facts["bias"].values())]
        bias = Panel.draw(
            picture,
            (left, 342, 290, 140),
            last,
            (-reach, reach),
            title=f"Block {block}: bias of the choice",
            x_unit="step",
            y_unit="added to the scores",
        )
        for expert in range(n_experts):
            loads = [row[column][expert] for row in facts["load"]]
            share.curve(facts["steps"], loads, expert, thin=True)
            share.curve(facts["steps"], smoothed(loads, 9), expert)
            bias.curve(bias_steps, [row[expert] for row in biases], expert)
            bias.dots(bias_steps, [row[expert] for row in biases], expert, 2.5)
    told = f"bias moved by {facts['balance_rate']:g} a step; thick: moving mean"
    picture.text(360, 544, f"{source(facts)}; {told}", "soft small")
    return picture


def expert_tokens() -> Picture:
    """Which kinds of token each expert gets, and the tokens that it gets most decidedly."""
    facts = measured("experts")
    kinds = sorted(facts["kinds"].items(), key=lambda each: -each[1]["tokens"])
    n_experts = len(facts["load"][0])
    top, left, cell = 66, 250, 86
    below = top + 26 * len(kinds) + 36
    lines = [(layer, expert) for layer in range(len(facts["blocks"])) for expert in range(n_experts)]
    picture = Picture(720, below + 24 * len(lines) + 40, "Which expert takes which kind of token, in percent")
    picture.text(24, 48, "kind of token", "soft", "start")
    picture.text(left - 14, 48, "in the text", "soft", "end")
    for layer, block in enumerate(facts["blocks"]):
        x = left + layer * (cell * n_experts + 40)
        picture.text(x + cell * n_experts / 2, 22, f"block {block}", "ink strong")
        for expert in range(n_experts):
            picture.text(x + cell * (expert + 0.5), 48, f"expert {expert + 1}", "soft")
        rows = [found["shares"][layer] for _, found in kinds]
        heat_map(picture, (x, top, cell, 26), rows, tell=lambda share: f"{100 * share:.0f} %")
    for row, (name, found) in enumerate(kinds):
        y = top + 26 * row + 13
        picture.text(24, y, name, "ink", "start")
        picture.text(left - 14, y, f"{100 * found['tokens'] / facts['read']:.1f} %", "soft", "end")
    for row, (layer, expert) in enumerate(lines):
        y = below + 24 * row
        picture.text(24, y, f"block {facts['blocks'][layer]}, expert {expert + 1} most of all", "soft", "start")
        picture.text(left, y, "  ".join(map(visible, facts["tokens"][layer][expert])), "ink code small", "start")
    told = f"{facts['read']:,} tokens of held-out text; · is a space, ·×4 four, ⏎ a new line"
    picture.text(360, picture.height - 18, f"{source(facts)}; {told}", "soft small")
    return picture


def visible(token: str) -> str:
    """A token whose spaces can be seen; of many equal ones, how many."""
    spaces = len(token) - len(token.lstrip(" "))
    lead = "·" * spaces if spaces < 3 else f"·×{spaces}"
    return lead + token[spaces:].replace("\r", "").replace("\n", "⏎")


def expert_choice() -> Picture:
    """What the bias does to the load, and how far the token alone decides."""
    facts = measured("experts")
    n_experts = len(facts["load"][0])
    picture = Picture(
        720, 88 + 76 * len(facts["blocks"]), "The effect of the bias on the load, and what decides the expert"
    )
    picture.text(24, 22, "Load of the experts", "ink strong", "start")
    picture.text(400, 22, "How often the expert is guessed", "ink strong", "start")
    legend(picture, 190, 22, [f"expert {number + 1}" for number in range(n_experts)], swatch=True)
    for layer, block in enumerate(facts["blocks"]):
        y = 58 + 76 * layer
        for row, (name, loads) in enumerate((("with its bias", "load"), ("without it", "load_without_bias"))):
            at, here = 146.0, y + 30 * row
            picture.text(136, here, f"block {block} {name}" if row == 0 else name, "soft", "end")
            for expert, share in enumerate(facts[loads][layer]):
                picture.rect(at, here - 11, 220 * share - 1, 22, f"fill{expert}")
                if share > 0.12:
                    picture.text(at + 110 * share, here, f"{100 * share:.0f} %", f"{ink_on(expert, 1)} small")
                at += 220 * share
        ways = (("always the busiest", "most", 4), ("from the token alone", "token", 3))
        for row, (name, way, series) in enumerate(ways):
            share = facts["guessed"][layer][way]
            here = y + 30 * row
            picture.text(536, here, name, "soft", "end")
            picture.rect(546, here - 11, 110 * share, 22, f"fill{series}")
            picture.text(552 + 110 * share, here, f"{100 * share:.0f} %", "ink small", "start")
    told = f"{facts['read']:,} tokens of held-out text"
    picture.text(360, picture.height - 18, f"{source(facts)}; {told}", "soft small")
    return picture
