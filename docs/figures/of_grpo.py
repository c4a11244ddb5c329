"""Pictures of docs/concepts/grpo.md: one group, the clip, and a run step by step."""

from collections.abc import Sequence
from typing import Any

import torch

from docs.figures.charts import Panel, legend, up_to
from docs.figures.facts import measured, source
from docs.figures.picture import Picture
from nanollm.report.charts import smoothed
from nanollm.rl.loss import ObjectiveConfig, surrogate

REPLY_WIDTH, REPLY_LINES = 66, 3  # characters of a line, lines of a reply
# Where what is asked of the code changes its course: between these both ways are straight.
RATIOS = (0.01, 0.799, 0.801, 1.279, 1.281, 4.99, 5.01, 6.0)


def grpo_group() -> Picture:
    """The replies to one problem, what they earned, and their advantages."""
    facts = measured("grpo")
    group = facts["group"]
    replies = sorted(group["replies"], key=lambda each: -each["advantage"])
    texts = [wrapped(" ⏎ ".join(each["reply"].split("\n")), REPLY_WIDTH)[:REPLY_LINES] for each in replies]
    question = wrapped(group["question"], 96)
    top = 66 + 17 * len(question)
    height = 18 + 15 * max(map(len, texts))
    picture = Picture(
        720, top + height * len(replies) + 40, "A group of replies to one problem, with rewards and advantages"
    )
    for row, line in enumerate(question):
        picture.text(20, 24 + 17 * row, line, "ink strong", "start")
    picture.text(20, top - 26, "reply", "soft", "start")
    picture.text(510, top - 26, "reward", "soft")
    picture.text(620, top - 26, "advantage", "soft")
    picture.line((620, top - 12), (620, top + height * len(replies) - 12))
    reach = max(abs(each["advantage"]) for each in replies)
    for row, (each, lines) in enumerate(zip(replies, texts, strict=True)):
        y, width = top + height * row + height / 2 - 12, 76 * each["advantage"] / reach
        for number, line in enumerate(lines):
            picture.text(20, y + 15 * (number - (len(lines) - 1) / 2), line, "ink code small", "start")
        picture.text(510, y, f"{each['reward']:.2f}", "ink")
        picture.rect(620 + min(0, width), y - 11, abs(width), 22, f"fill{0 if width > 0 else 1}")
        side = 1 if width < 0 else -1
        signed = f"{each['advantage']:+.2f}".replace("-", "−")
        picture.text(620 + 5 * side, y, signed, "ink small", "start" if side > 0 else "end")
    told = f"{source(facts)}; step {group['step']}; the answer is {group['answer']}"
    picture.text(360, picture.height - 16, told, "soft small")
    return picture


def wrapped(text: str, most: int) -> list[str]:
    """Words in lines of at most so many characters."""
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) >= most:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def grpo_clip() -> Picture:
    """How much a token pulls at the weights when its probability has changed since it was drawn, by the code itself."""
    picture = Picture(720, 350, "The pull of a token on the weights by the ratio of its probabilities, clip and CISPO")
    for column, (advantage, title) in enumerate(((1.0, "A better reply: A = 1"), (-1.0, "A worse reply: A = −1"))):
        reach = (-0.5, 6.0) if advantage > 0 else (-6.0, 0.5)
        panel = Panel.draw(
            picture,
            (60 + 352 * column, 70, 290, 190),
            (0, 6),
            reach,
            title=title,
            x_unit="new probability / old probability",
            y_unit="factor of ∇ log p",
        )
        for series, kind in enumerate(("clip", "cispo")):
            panel.curve(RATIOS, pulls(RATIOS, advantage, ObjectiveConfig(surrogate=kind)), series)
        panel.level(0.0)
    c = ObjectiveConfig()
    names = [f"clip to {1 - c.clip_low:g} … {1 + c.clip_high:g} (PPO)", f"CISPO, weight at most {c.cispo_max:g}"]
    legend(picture, 60, 324, names)
    return picture


def pulls(ratios: Sequence[float], advantage: float, c: ObjectiveConfig) -> list[float]:
    """Minus the gradient of the loss by the token's log-probability, at each ratio."""
    logprobs = torch.tensor(ratios).log().requires_grad_()
    old, advantages = torch.zeros(len(ratios)), torch.full((len(ratios),), advantage)
    terms, _ = surrogate(logprobs, old, advantages, torch.arange(len(ratios)), c)
    (gradient,) = torch.autograd.grad(terms.sum(), logprobs)
    return (-gradient).tolist()


def grpo_steps() -> Picture:
    """Five panels over the steps of a run, and one of the models before and after it."""
    facts = measured("grpo")
    steps = facts["steps"]
    picture = Picture(720, 590, "A run of GRPO: reward, problems solved, groups, entropy and length, before and after")
    dropped = [100 * a / b for a, b in zip(facts["groups_dropped"], facts["groups"], strict=True)]
    entropy = [(step, value) for step, value in zip(steps, facts["entropy"], strict=True) if value is not None]
    columns = (
        (0, "Reward", "mean of all replies of a step", steps, facts["reward"]),
        (3, "Groups that teach nothing", "percent of the step's groups", steps, dropped),
        (4, "Entropy", "nats per token", *map(list, zip(*entropy, strict=True))),
        (5, "Length of the replies", "tokens, mean", steps, facts["reply_tokens"]),
    )
    for place, title, unit, xs, ys in columns:
        reach = (0.0, 100.0) if "percent" in unit else up_to(ys, 4)
        panel = Panel.draw(
            picture, place_of(place), (0, steps[-1]), reach, title=title, x_unit="step", y_unit=unit, most=4
        )
        panel.curve(xs, ys, 0, thin=True)
        panel.curve(xs, smoothed(ys, max(1, len(ys) // 12)), 0)
    solved(picture, facts)
    compared(picture, facts)
    told = f"{facts['rollout']['prompts']} problems × {facts['rollout']['group_size']} replies per step"
    picture.text(360, 572, f"{source(facts)}; {told}; thick: moving mean", "soft small")
    return picture


def place_of(number: int) -> tuple[float, float, float, float]:
    """Left, top, width and height of one of six panels."""
    return 52 + 238 * (number % 3), 66 + 268 * (number // 3), 176, 150


def solved(picture: Picture, facts: Any) -> None:
    """The problems solved on the way, with 95 % intervals."""
    unit, last = f"percent of {facts['validation_problems']} others", facts["steps"][-1]
    panel = Panel.draw(
        picture, place_of(1), (0, last), (0, 100), title="Solved on the way", x_unit="step", y_unit=unit, most=4
    )
    checks = facts["checks"]
    shares = [100 * each["val_accuracy"] for each in checks]
    panel.curve([each["step"] for each in checks], shares, 3)
    for each, share in zip(checks, shares, strict=True):
        panel.whisker(each["step"], 100 * each["val_accuracy_low"], 100 * each["val_accuracy_high"], 3)
        panel.dots([each["step"]], [share], 3)


def compared(picture: Picture, facts: Any) -> None:
    """The problems that the models before and after the run solve, by split, with 95 % intervals."""
    splits = facts["evaluations"]
    unit = f"percent of {splits[0]['after']['n']:,}, 95 % intervals" if splits else "not measured"
    panel = Panel.draw(
        picture,
        place_of(2),
        (-0.5, max(1, len(splits)) - 0.5),
        (0, 100),
        title="Before and after",
        x_unit="split of the problems",
        y_unit=unit,
        x_names=[each["split"] for each in splits],
        most=4,
    )
    for at, each in enumerate(splits):
        for series, (x, name, anchor) in enumerate(((at - 0.1, "before", "end"), (at + 0.1, "after", "start"))):
            score = each[name]
            panel.whisker(x, 100 * score["low"], 100 * score["high"], (4, 3)[series])
            panel.dots([x], [100 * score["value"]], (4, 3)[series])
            beside = panel.x.place(x) + (-7, 7)[series]
            picture.text(
                beside, panel.y.place(100 * score["value"]), f"{100 * score['value']:.1f}", "ink small", anchor
            )
            if at == 0:
                picture.text(beside, panel.y.place(100 * score["value"]) + 16, name, "soft small", anchor)
