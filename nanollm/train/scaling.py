"""Scaling law: the loss to expect of a size and a number of tokens, with an interval, fitted to runs of small models.

L(N, D) = E + A / N^alpha + B / D^beta in bits per byte: approach 3 of arXiv:2203.15556. Given both exponents it is
linear, so each pair on a grid is solved exactly, by Bayesian regression of the relative error, and the pairs are
averaged by how well they explain the runs: exponents that few runs cannot tell apart widen the interval.
Letters: N weights that a token is multiplied with, those of the head included; D tokens, where repeated text counts as
arXiv:2305.16264 measured; K fits. Without the head, N explained the runs of docs/log.md less well (1.1 % for 0.9 %).
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nanollm.durable import read_json
from nanollm.model.config import ModelConfig

Floats = npt.NDArray[np.float64]

LEVEL = 0.8
"""Of the runs that are predicted, so many should end within the interval."""
MAX_EPOCHS = 4
MIN_SIZES, MIN_HORIZONS = 3, 2
MAX_ERROR = 0.1
"""Half an interval, relative to the loss, from which nothing is said."""
FAR = 3
"""Half intervals that a run may end from where the others put it."""
DRAWS = 20_000

EXPONENTS = np.geomspace(0.05, 1.5, 24)
NOISE = np.geomspace(0.0015, 0.048, 6)
"""Relative standard deviations of a run; two seeds differ by 0.3 %."""


@dataclass(frozen=True)
class Point:
    """A run that has ended."""

    parameters: int
    """ModelConfig.multiplied_parameters."""
    tokens: float
    """As `seen` counts them."""
    loss: float
    """Bits per byte of validation text."""


@dataclass(frozen=True)
class Expected:
    """The loss of a run to come, and the interval that holds it with probability LEVEL."""

    value: float
    low: float
    high: float

    @property
    def error(self) -> float:
        """Half the interval, relative to the value."""
        return (self.high - self.low) / 2 / self.value


@dataclass(frozen=True)
class Law:
    """Many fits (E, A, B) with covariances, exponents, noise and weights; N and D relative to the runs' centre."""

    center: tuple[float, float]
    exponents: Floats  # (K, 2)
    noise: Floats  # (K,)
    means: Floats  # (K, 3)
    covariances: Floats  # (K, 3, 3)
    weights: Floats  # (K,)

    def value(self, parameters: float, tokens: float) -> float:
        """The loss without its interval."""
        return float(self.weights @ self._parts(parameters, tokens)[0])

    def expect(self, parameters: float, tokens: float) -> Expected:
        """Low and high are quantiles of drawn runs, the same ones each time."""
        losses, variances = self._parts(parameters, tokens)
        draw = np.random.default_rng(0)
        chosen = draw.choice(len(self.weights), DRAWS, p=self.weights)
        runs = losses[chosen] + np.sqrt(variances[chosen]) * draw.standard_normal(DRAWS)
        low, high = np.quantile(runs, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return Expected(self.value(parameters, tokens), float(low), float(high))

    def predict(self, parameters: float, tokens: float) -> Expected:
        """The same; ValueError where the interval is too wide to say anything."""
        found = self.expect(parameters, tokens)
        if found.error > MAX_ERROR or not found.low > 0:
            raise ValueError(
                f"{parameters:,} parameters and {tokens:,.0f} tokens are too far from the ladder's runs: the interval "
                f"would be {found.low:.2f} to {found.high:.2f}; train larger sizes, or longer"
            )
        return found

    def best(self) -> dict[str, float]:
        """The coefficients of the heaviest fit, for people, and the noise of a run."""
        k = int(self.weights.argmax())
        (alpha, beta), (e, a, b) = self.exponents[k].tolist(), self.means[k].tolist()
        a, b = a * self.center[0] ** alpha, b * self.center[1] ** beta
        return {
            "E": e,
            "A": float(a),
            "alpha": alpha,
            "B": float(b),
            "beta": beta,
            "noise": float(self.weights @ self.noise),
        }

    def _parts(self, parameters: float, tokens: float) -> tuple[Floats, Floats]:
        """Mean and variance of a run, of each fit: (K,), (K,)."""
        x = _terms(np.array([[parameters, tokens]]) / self.center, self.exponents)[:, 0]
        losses = np.einsum("kt,kt->k", x, self.means)
        return losses, np.einsum("kt,ktu,ku->k", x, self.covariances, x) + (self.noise * losses) ** 2


def _terms(places: Floats, exponents: Floats) -> Floats:
    """What E, A and B are multiplied with at each place (P, 2): (K, P, 3)."""
    powers = places[None] ** -exponents[:, None]
    return np.concatenate([np.ones_like(powers[..., :1]), powers], axis=-1)


def regress(points: Sequence[Point]) -> Law:
    """All fits, whether they hold or not.

    Beforehand each of the three terms is thought to be a third of the loss at the centre, give or take as much, and an
    exponent 0.3, give or take a factor of 1.65.
    """
    places = np.array([[each.parameters, each.tokens] for each in points], float)
    losses = np.array([each.loss for each in points])
    center = tuple(np.exp(np.log(places).mean(0)))
    grid = np.array(list(product(EXPONENTS, EXPONENTS, NOISE)))
    exponents, noise = grid[:, :2], grid[:, 2]
    x = _terms(places / center, exponents) / losses[:, None]  # (K, P, 3), of a loss that is 1
    third = losses.mean() / 3
    precision = np.einsum("kpt,kpu->ktu", x, x) / noise[:, None, None] ** 2 + np.eye(3) / third**2
    moment = x.sum(1) / noise[:, None] ** 2 + 1 / third
    covariances = np.linalg.inv(precision)
    means = np.einsum("ktu,ku->kt", covariances, moment)
    evidence = (np.einsum("kt,kt->k", moment, means) - len(points) / noise**2 - 3) / 2
    evidence -= len(points) * np.log(noise) + np.linalg.slogdet(precision)[1] / 2 + 3 * math.log(third)
    evidence -= (np.log(exponents / 0.3) ** 2).sum(1) / 2 / 0.5**2
    evidence[(means < 0).any(1)] = -np.inf
    weights = np.exp(evidence - evidence.max())
    kept = weights > 1e-6
    weights = weights[kept] / weights[kept].sum()
    return Law((center[0], center[1]), exponents[kept], noise[kept], means[kept], covariances[kept], weights)


def fit(points: Sequence[Point]) -> Law:
    """The law of some runs. ValueError where they are too few, or where one of them contradicts the others."""
    horizons: dict[int, set[float]] = {}
    for each in points:
        horizons.setdefault(each.parameters, set()).add(each.tokens)
    enough = [size for size, tokens in horizons.items() if len(tokens) >= MIN_HORIZONS]
    if len(enough) < MIN_SIZES:
        raise ValueError(
            f"a fit needs {MIN_SIZES} sizes, each trained on {MIN_HORIZONS} numbers of tokens; there are {len(enough)}"
        )
    for number, left_out in enumerate(points):
        others = regress([*points[:number], *points[number + 1 :]]).expect(left_out.parameters, left_out.tokens)
        distance = abs(left_out.loss - others.value) / ((others.high - others.low) / 2)
        if not distance <= FAR:
            raise ValueError(
                f"the fit does not hold: {left_out.parameters:,} parameters ended at {left_out.loss:.4f} after "
                f"{left_out.tokens:,.0f} tokens, where the other runs say {others.low:.4f} to {others.high:.4f}"
            )
    return regress(points)


# --- ladders ---


@dataclass(frozen=True)
class Ladder:
    """Runs of small models on one text."""

    name: str
    points: Sequence[Point]
    text_tokens: float
    """Of the text, which longer runs read several times."""
    shape: Mapping[str, int]
    """What all runs share, and a run that is predicted must have too: vocab_size and context_length."""

    @classmethod
    def read(cls, file: Path) -> "Ladder":
        """From the scale.json of `nanollm scale`. ValueError for another file."""
        found = read_json(file)
        try:
            points = [Point(each["parameters"], each["seen"], each["val_bpb"]) for each in found["runs"]]
            shape = {name: found["runs"][0]["model"][name] for name in ("vocab_size", "context_length")}
            return cls(str(file), points, found["text_tokens"], shape)
        except (IndexError, KeyError, TypeError):
            raise ValueError(f"{file} is not a ladder; give the scale.json of nanollm scale") from None

    @cached_property
    def law(self) -> Law:
        """ValueError where the runs have none."""
        if missing := sum(each.loss is None for each in self.points):
            raise ValueError(f"{missing} of its {len(self.points)} runs are missing; nanollm scale goes on with them")
        return fit(self.points)

    def predict(self, m: ModelConfig, tokens: float) -> Expected:
        """The loss to expect. ValueError, with the reason, where nothing can be said."""
        if other := [name for name, value in self.shape.items() if getattr(m, name) != value]:
            raise ValueError(
                f"the ladder's runs have {other[0]} {self.shape[other[0]]:,}, this one has {getattr(m, other[0]):,}"
            )
        if tokens > MAX_EPOCHS * self.text_tokens:
            raise ValueError(
                f"{tokens:,.0f} tokens are {tokens / self.text_tokens:.1f} epochs of the text, and what more than "
                f"{MAX_EPOCHS} teach is not known"
            )
        return self.law.predict(m.multiplied_parameters, seen(tokens, self.text_tokens))


def seen(tokens: float, text: float) -> float:
    """Tokens of new text that teach as much as these, read in epochs of a text (arXiv:2305.16264, equation 5)."""
    if tokens <= text:
        return tokens
    half_life = 15.39
    return text * (1 + half_life * -math.expm1((1 - tokens / text) / half_life))


def tokens_per_step(tokens: float) -> float:
    """Best batch for a run of so many tokens, whatever the size (docs/log.md; measured from 4e5 to 3.5e6).

    Half or twice as much costs about 0.01 bits per byte.
    """
    return 0.69 * tokens**0.6


def seconds_of(budget: str) -> float:
    """The seconds in 90s, 10m or 1h30m."""
    parts = re.findall(r"(\d+(?:\.\d+)?)([hms])", budget)
    seconds = sum(float(number) * {"h": 3600, "m": 60, "s": 1}[unit] for number, unit in parts)
    if not seconds or "".join(map("".join, parts)) != budget:
        raise ValueError(f"--budget: expected a time such as 90s, 10m or 1h30m, got {budget}")
    return seconds
