"""Pictures of docs/concepts/grpo.md: one group, the clip, and a run step by step."""

from collections.abc import Sequence

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
    """Six panels over the steps of a run."""
    facts = measured("grpo")
    steps, checks = facts["steps"], facts["checks"]
    picture = Picture(720, 590, "A run of GRPO step by step: reward, problems solved, length, entropy, groups, endings")
    dropped = [100 * a / b for a, b in zip(facts["groups_dropped"], facts["groups"], strict=True)]
    entropy = [(step, value) for step, value in zip(steps, facts["entropy"], strict=True) if value is not None]
    columns = (
        ("Reward", "mean of all replies of a step", steps, facts["reward"]),
        ("Solved", f"percent of {facts['validation_problems']} others, greedy", [], []),
        ("Length of the replies", "tokens, mean", steps, facts["reply_tokens"]),
        ("Entropy", "nats per token", *map(list, zip(*entropy, strict=True))),
        ("Groups that teach nothing", "percent of the step's groups", steps, dropped),
        ("Replies that end", "percent", steps, [100 * share for share in facts["finished"]]),
    )
    for number, (title, unit, xs, ys) in enumerate(columns):
        place = (52 + 238 * (number % 3), 66 + 268 * (number // 3), 176, 150)
        if title == "Solved":
            solved(picture, place, unit, steps[-1], checks)
            continue
        reach = (0.0, 100.0) if "percent" in unit else up_to(ys, 4)
        panel = Panel.draw(picture, place, (0, steps[-1]), reach, title=title, x_unit="step", y_unit=unit, most=4)
        panel.curve(xs, ys, 0, thin=True)
        panel.curve(xs, smoothed(ys, max(1, len(ys) // 12)), 0)
    told = (
        f"{source(facts)}; {facts['rollout']['prompts']} problems × {facts['rollout']['group_size']} replies per step"
    )
    picture.text(360, 572, f"{told}; thick: moving mean", "soft small")
    return picture


def solved(
    picture: Picture, place: tuple[float, float, float, float], unit: str, last: int, checks: list[dict[str, float]]
) -> None:
    """The panel of the problems solved, with 95 % intervals."""
    panel = Panel.draw(picture, place, (0, last), (0, 100), title="Solved", x_unit="step", y_unit=unit, most=4)
    shares = [100 * each["val_accuracy"] for each in checks]
    panel.curve([each["step"] for each in checks], shares, 3)
    for each, share in zip(checks, shares, strict=True):
        panel.whisker(each["step"], 100 * each["val_accuracy_low"], 100 * each["val_accuracy_high"], 3)
        panel.dots([each["step"]], [share], 3)
    for each, share, anchor in ((checks[0], shares[0], "start"), (checks[-1], shares[-1], "end")):
        picture.text(
            panel.x.place(each["step"]),
            panel.y.place(100 * each["val_accuracy_high"]) - 10,
            f"{share:.0f} %",
            "ink strong",
            anchor,
        )
