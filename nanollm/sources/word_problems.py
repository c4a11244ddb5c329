"""Generated math word problems, as many as wanted, that even a very small model can learn to solve.

From the stories of word_stories.txt: one is drawn, then names, things and numbers, and the worked solution is written
in GSM8K's form (arXiv:2110.14168): one sum per line with its calculator note, "7+5=<<7+5=12>>12", then "#### 12".
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, permutations
from operator import add, mul, sub
from pathlib import Path
from random import Random
from typing import overload

from nanollm.sources.gsm8k import ANSWER_MARK, Problem, grade
from nanollm.sources.split import hash_to_unit
from nanollm.text.chat import Conversation, Message

SPLITS = ("train", "test", "new_numbers", "heldout")
LEVELS = (1, 2, 3, 4)
LENGTH = 2**31 - 1  # of each split: as good as endless
TEST_SHARE = 0.1
TEST_KEY = "word problems: test"  # without the seed: who trains with another seed must not meet the test either
MIN_LARGEST = 5  # below it some stories hardly find numbers that fit
MAX_COUNT = 9
TRIES = 10_000  # of numbers for one story; the rarest take 30 on average

_NAMES = "Mia Tom Anna Ben Lucy Sam Emma Max Rosa Leo Jane Paul Nora Jack Ella Noah Zoe Finn Ruth Carl"
_ITEMS = """apple book pen card coin cup ball shell stamp cookie toy egg banana bottle button candle carrot doll
drum feather flag flower hat key kite lemon letter marble mask nut orange pebble pencil photo pin ring seed sock
spoon sticker"""
NAMES, ITEMS = tuple(_NAMES.split()), tuple(_ITEMS.split())
PEOPLE = tuple(zip(NAMES, cycle(("she", "he")), strict=False))
BOXES = ("boxes", "bags", "baskets", "jars")

Values = dict[str, int]  # by letter
Sum = tuple[str, str, str, str]  # letter, operand, operator, operand

SLOT = re.compile(r"\{(?:(\w)=)?(\w)(?:([-+*/])(\w))?\}")  # {a} or {t=a*k}; names like {items} are longer
STEP = re.compile(r"\[(\w)=(\w)([-+*/])(\w)\]")  # [x=a+b]


def _divide(a: int, b: int) -> int:
    """a / b, or -1 where it has a rest."""
    return -1 if a % b else a // b


OPERATORS: Mapping[str, Callable[[int, int], int]] = {"+": add, "-": sub, "*": mul, "/": _divide}


@dataclass(frozen=True)
class Story:
    """A question and its solution for str.format, and what has to be drawn and worked out for them."""

    question: str
    solution: str
    drawn: tuple[str, ...]  # letters
    sums: tuple[Sum, ...]
    constants: Values  # "2" -> 2
    level: int
    heldout: bool

    @classmethod
    def of(cls, question: str, *steps: str, heldout: bool = False) -> "Story":
        """Read what word_stories.txt says."""
        solution = "\n".join(steps)
        slots, sums = SLOT.findall(question), STEP.findall(solution)
        sums = [slot for slot in slots if slot[0]] + sums  # the question's numbers come first
        made = {target for target, *_ in sums}
        used = dict.fromkeys(name for _, left, _, right in slots + sums for name in (left, right) if name)
        return cls(
            question=SLOT.sub(lambda slot: f"{{{slot[1] or slot[2]}}}", question),
            solution=f"{STEP.sub(_write_sum, solution)}\n{ANSWER_MARK} {{{sums[-1][0]}}}",
            drawn=tuple(name for name in used if name.isalpha() and name not in made),
            sums=tuple(sums),
            constants={name: int(name) for name in used if name.isdigit()},
            level=len(steps),
            heldout=heldout,
        )

    def draw_numbers(self, rng: Random, largest: int) -> Values:
        """Numbers for all letters; each is whole, at least 2 (the texts say "apples") and at most 5 * largest."""
        limit = 5 * largest
        tops = {"j": MAX_COUNT, "k": MAX_COUNT, "p": limit}
        spans = [(name, tops.get(name, largest) - 1) for name in self.drawn]
        for _ in range(TRIES):
            values = {name: 2 + int(rng.random() * span) for name, span in spans}
            values.update(self.constants)
            if self._work_out(values, limit):
                return values
        raise AssertionError(f"no numbers up to {largest} fit {self.question!r}")

    def _work_out(self, values: Values, limit: int) -> bool:
        """Add the results of the sums; False as soon as one is out of bounds."""
        for target, left, operator, right in self.sums:
            number = OPERATORS[operator](values[left], values[right])
            if not 2 <= number <= limit:
                return False
            values[target] = number
        return True


def _write_sum(step: re.Match[str]) -> str:
    """{a}+{b}=<<{a}+{b}={x}>>{x} for [x=a+b]."""
    target, left, operator, right = step.groups()
    left, right = (f"{{{operand}}}" if operand.isalpha() else operand for operand in (left, right))
    return f"{left}{operator}{right}=<<{left}{operator}{right}={{{target}}}>>{{{target}}}"


def _cast(people: Sequence[tuple[str, str]]) -> dict[str, str]:
    (name, he), (other, _), (third, _) = people
    him = {"he": "him", "she": "her"}[he]
    return {"name": name, "other": other, "third": third, "he": he, "He": he.title(), "him": him}


def _read_stories() -> Iterator[Story]:
    """The paragraphs of word_stories.txt; one that begins with # is no story."""
    heldout = False
    for paragraph in Path(__file__).with_name("word_stories.txt").read_text("utf-8").strip().split("\n\n"):
        heldout |= paragraph.startswith("# Held out")
        if not paragraph.startswith("#"):
            yield Story.of(*paragraph.splitlines(), heldout=heldout)


STORIES = tuple(_read_stories())
STORIES_OF = {
    (level, heldout): tuple(story for story in STORIES if (story.level, story.heldout) == (level, heldout))
    for level in LEVELS
    for heldout in (False, True)
}
CASTS = tuple(map(_cast, permutations(PEOPLE, 3)))
GOODS = tuple(
    {"items": f"{item}s", "things": f"{thing}s", "boxes": boxes}
    for item, thing in permutations(ITEMS, 2)
    for boxes in BOXES
)
BLANKS = dict.fromkeys([*CASTS[0], *GOODS[0]], "_")


@dataclass(frozen=True, kw_only=True)
class WordProblems:
    """Generated problems with worked solutions.

    Three splits ask what train never asks, each further away from it. test: questions that are not in train.
    new_numbers: the same stories with numbers that they never have in train or test, whatever the names and things.
    heldout: stories that no other split tells. What belongs where depends on the text alone, not on the seed.
    """

    levels: tuple[int, ...] = (1, 2)  # numbers of steps; each comes equally often
    largest: int = 20  # number of a question, but for totals; no number of a problem is above 5 * largest
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(self.levels))
        if not self.levels or not set(self.levels) <= set(LEVELS) or len(set(self.levels)) < len(self.levels):
            known = ", ".join(map(str, LEVELS))
            raise ValueError(f"levels must be one or more of {known}, each once, got {list(self.levels)}")
        if self.largest < MIN_LARGEST:
            raise ValueError(f"largest must be at least {MIN_LARGEST}, got {self.largest}")

    def problems(self, split: str) -> "Generated":
        """The problems of a split: endless, each made when it is asked for."""
        if split not in SPLITS:
            raise ValueError(f"words has no split {split!r}; it has {', '.join(SPLITS)}")
        return Generated(self, split)

    def grade(self, problem: Problem, reply: str) -> bool:
        """Whether the reply's number after "####" is the problem's."""
        return grade(reply, problem.answer)

    def make(self, split: str, place: int) -> Problem:
        """The problem at a place of a split: a pure function of both and of this config."""
        rng = Random(f"{self.seed} {split} {place}")
        stories = STORIES_OF[rng.choice(self.levels), split == "heldout"]
        while True:  # for test and new_numbers about ten times
            story = rng.choice(stories)
            values = story.draw_numbers(rng, self.largest)
            slots = {**rng.choice(CASTS), **rng.choice(GOODS), **values}
            question = story.question.format_map(slots)
            if split in ("heldout", split_of(question, story.question.format_map(BLANKS | values))):
                return Problem(question, story.solution.format_map(slots))


def lessons(problems: Iterable[Problem]) -> Iterator[Conversation]:
    """Problems and their solutions as conversations: the fourth and fifth of every five are two turns of one.

    From those a model learns that another question may follow, and that what was said before does not answer it.
    """
    said: tuple[Message, ...] = ()
    for place, problem in enumerate(problems):
        said += problem.conversation.messages
        if place % 5 != 3:
            yield Conversation(said)
            said = ()
    if said:
        yield Conversation(said)


def split_of(question: str, without_words: str) -> str:
    """Where a question belongs, unless its story is held out; `without_words` has blanks for names and things."""
    if hash_to_unit(without_words, TEST_KEY) < TEST_SHARE:
        return "new_numbers"
    return "test" if hash_to_unit(question, TEST_KEY) < TEST_SHARE else "train"


@dataclass(frozen=True)
class Generated(Sequence[Problem]):
    """Problems by their places. A slice is as lazy as the whole."""

    source: WordProblems
    split: str
    places: range = range(LENGTH)

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> Problem: ...
    @overload
    def __getitem__(self, index: slice) -> "Generated": ...
    def __getitem__(self, index: int | slice) -> "Problem | Generated":
        if isinstance(index, slice):
            return Generated(self.source, self.split, self.places[index])
        return self.source.make(self.split, self.places[index])
