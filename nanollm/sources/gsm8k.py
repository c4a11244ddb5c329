"""GSM8K (arXiv:2110.14168): grade-school math problems, worked solutions, and whether a reply has the right number.

A solution is kept exactly as written, with its calculator notes <<48/2=24>> and its last line "#### 24". The answer
is the text after the mark, exactly as well: "1,080" stays "1,080". Two answers are the same if their numbers are,
exactly: 1,080 = 1080.0, 3/4 = 0.75, and 0.33 is not 1/3. A calculator note is checked as exactly, and without knowing
the problem, so a solution can be judged step by step.
"""

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

from nanollm.sources.calculator import evaluate
from nanollm.sources.datasets import stream_rows
from nanollm.sources.files import BadRecord, OnBad, find_files, is_named, problem, read_records
from nanollm.text.chat import Conversation

NAME, CONFIG = "openai/gsm8k", "main"
COLUMNS = ("question", "answer")
ANSWER_MARK = "####"
MAX_CHARS = 200  # a longer text is no answer, so that no reply can make the grader slow

How = Literal["strict", "flexible"]

# One number as people write it. [0-9], because \d is any digit of Unicode. A sign counts only where it cannot be a
# hyphen or a minus between two numbers, a leading point only where it cannot be the end of "Rs." or of an ellipsis.
NUMBER = re.compile(
    r"""(?: (?<![\w)]) (?P<sign> [-+] ) )? [$€£¥₹]?
    (?: (?: (?P<whole> [0-9]+ ) [ ] )? (?P<top> [0-9]+ ) / (?P<bottom> [0-9]+ )
      | (?P<decimal> (?: [0-9]{1,3} (?: ,[0-9]{3} )+ (?![0-9]) | [0-9]+ ) (?: \.[0-9]* )? | (?<![\w.]) \.[0-9]+ )
    ) %?""",
    re.VERBOSE,
)
# Words and signs that make another number of the one beside them, or leave open which one is meant.
ANYWHERE = re.compile(
    r"""\b(?: zero | one | two | three | four | five | six | seven | eight | nine | ten | eleven | twelve
      | (?:thir|four|fif|six|seven|eigh|nine)teen | (?:twen|thir|for|fif|six|seven|eigh|nine)ty | dozens? | couple
      | hundreds? | thousands? | [mbtr]+illi(?:on|ard)\w* | mille? | lakhs? | lacs? | crores? | tausend | half | halves
      | thirds? | quarters? | fourths? | (?:fif|six|seven|eigh|nin|ten|hundred|thousand)ths? | squared? | cubed | twice
      | double | triple | thrice | root | power | factorial | recurring | repeating | sqrt | log | ln | exp | sin | cos
      | tan | abs | minus | negative | plus | times | divided | over | under | above | below | than | least | most
      | between | until | through | up | to | or | about | around | approx\w* | almost | nearly | roughly | circa | ca
      | not | except | maximum | minimum )\b
    | [<>≤≥≦≧≠≈≃≅~∼≲≳±∓^_√∛∜×÷·⋅∙∑∏∫|&⁄十百千万億亿萬兆一二三四五六七八九]
    | \\ (?! (?: boxed|text|textbf|mathrm|mathbf|left|right|quad ) (?![a-z]) | [^a-zA-Z] )""",
    re.VERBOSE | re.IGNORECASE,
)
BEFORE = re.compile(r"[-+/—!]\W{0,4}\Z|[\w)]\s*\*\s*\Z|\bm(?:ax|in)\b\W*\Z", re.IGNORECASE)
AFTER = re.compile(  # 5k, 5 bn, 5th, 5!, 5+, 5-, 5/day, 5..., 5(x), 5*x
    r"\s*(?:[+/!…(]|\.\.|-(?![a-z]{3})|\*\w)|.*\b(?:[kmbtx]|mm|bn|bln|tn|trn|mn|mln|mil|mio|mrd|cr|scores?|gross|pairs?)\b",
    re.IGNORECASE,
)
MAGNITUDE = re.compile(r"\s*(?:hundred|thousand|million|billion|trillion|dozen|lakh|crore|bn)s?\b|[kKMB]\b")
UNITS = re.compile(
    r"(?:[kcm]m|[km]?g|lbs?|oz|ft|in|yd|mi|m?l|h|hrs?|mins?|s|secs?|[ap]m|[mk]ph|[CF])?(?![^\W\d_])", re.ASCII
)
"""What may be attached to a number: 24cm."""
POWER_OF_UNIT = re.compile(r"(?<=[A-Za-z])[²³]")  # 24 m²
TAG = re.compile(r"</?[A-Za-z][^<>]{0,20}>")
THOUSANDS_BY_POINT = re.compile(r"[1-9][0-9]{0,2}\.[0-9]{3}")
"""1.080 is 1080 to some and 1.08 to others."""
MINUS_SIGNS = str.maketrans(dict.fromkeys("−–‐‑﹣－", "-"))

NOTE = re.compile(r"<<([0-9+*/().-]{1,60})=(-?[0-9]{0,20}(?:\.[0-9]{1,20})?)>>")
NOTE_MARK = "<<"


@dataclass(frozen=True)
class Problem:
    question: str
    answer: str  # the worked solution, ending in "#### 24"
    columns: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """What else a task of your own knows of it, for its grader and rewards."""

    @property
    def conversation(self) -> Conversation:
        return Conversation.of(self.question, self.answer)


def problems(inputs: Sequence[Path] | None, split: str, on_bad: OnBad, name: str = NAME) -> Iterator[Problem]:
    """Problems of "train" or "test": from the files named for the split, in folders too, or from the hub.

    A row whose solution has no answer that can be graded is a bad record, like one without a question.
    """
    if inputs is not None:
        yield from read_records(files_of(inputs, split), COLUMNS, _parse, on_bad)
        return
    for row in stream_rows(name, split, COLUMNS, on_bad, config_name=CONFIG):
        if isinstance(parsed := _parse(row), str):
            on_bad(BadRecord(f"{name}:{split}", 0, f"{parsed} (question: {row[0][:40]!r})"))
        else:
            yield parsed


def files_of(inputs: Sequence[Path], split: str) -> list[Path]:
    """The files of one split by their names, so that a problem of the test is never trained on."""
    if named := [path for path in find_files(inputs) if is_named(path, split)]:
        return named
    raise ValueError(f"gsm8k needs files named for their split (train.jsonl, test.jsonl); none is named {split!r}")


def _parse(row: Sequence[Any]) -> Problem | str:
    """The problem of a row, or why it is none."""
    if reason := problem(row, COLUMNS):
        return reason
    question, answer = row
    final = extract_answer(answer)
    if final is None or number_of(final, point_is_decimal=True) is None:
        return f"answer must end in '{ANSWER_MARK} <number>', got {answer[-40:]!r}"
    return Problem(question, answer)


def extract_answer(reply: str, how: How = "strict") -> str | None:
    """The answer in a reply as it is written there, or None.

    strict: what stands after the last "####", to the end of that line; it need not be a number.
    flexible: the last number of the reply, wherever it stands. It forgives much: of "24 or 25" it takes 25.
    """
    if how == "flexible":
        return _last_number(reply)
    _, mark, behind = reply.rpartition(ANSWER_MARK)
    final = behind.partition("\n")[0].strip()
    return final if mark and final else None


def _last_number(reply: str) -> str | None:
    end = 1 + max(reply.rfind(digit) for digit in "0123456789")
    begin = max(0, end - MAX_CHARS)
    tail = reply[begin : end + 2]  # no more than a number takes, with the ".%" of "50.%"
    found = list(NUMBER.finditer(tail.translate(MINUS_SIGNS)))
    if not found or len(found[-1][0]) > MAX_CHARS // 2:  # the latter may have begun before the tail
        return None
    behind = reply[begin + found[-1].end() :][:MAX_CHARS]
    return None if MAGNITUDE.match(behind) else tail[found[-1].start() : found[-1].end()]


def number_of(text: str, *, point_is_decimal: bool = False) -> Fraction | None:
    """The exact value of an answer with one number in it, or None. Never raises; takes microseconds for any text.

    "1,080", "-3", "+4", "$5.50", ".5", "12.", "3/4", "1 1/2" (= 3/2), "24 apples", "50%" (= 50, the sign is a unit).
    None where anything may make it another number: two numbers ("24 or 25", "2+3", "5:30"), none ("x", "twenty", digits
    other than 0-9), grouping but by commas of thousands ("1,08", "1'080", "1{,}080"; "1.080" unless point_is_decimal),
    magnitudes ("5 million", "5k"), ordinals, comparisons ("at least 5", "~5"), LaTeX but \\boxed and \\text, signs in
    words ("minus 5"), "(5)", which is -5 to accountants, and more than 200 characters.
    """
    text = text.strip()
    if len(text) > MAX_CHARS:
        return None
    text = TAG.sub("", " ".join(text.split())).translate(MINUS_SIGNS)
    found = NUMBER.search(text)
    if found is None or _is_changed(text[: found.start()], found[0], text[found.end() :]):
        return None
    if not point_is_decimal and THOUSANDS_BY_POINT.fullmatch(found["decimal"] or ""):
        return None
    value = _value(found)
    return -value if value is not None and found["sign"] == "-" else value


def _is_changed(before: str, number: str, after: str) -> bool:
    """Whether something around a number makes it another one, or a second number stands there."""
    around = f"{before} {after}"
    if any(
        unicodedata.category(char) in ("Nd", "Nl", "No", "Mn", "Me", "Cf") for char in POWER_OF_UNIT.sub("", around)
    ):
        return True
    is_attached = number[0] in "0123456789." and before[-1:].isalpha()
    is_accounted = before.endswith("(") and after.startswith(")") and number[0] not in "+-"
    if is_attached or is_accounted or not UNITS.match(after):
        return True
    return any((ANYWHERE.search(around), BEFORE.search(before), AFTER.match(after)))


def _value(found: re.Match[str]) -> Fraction | None:
    """The value without its sign."""
    if found["decimal"]:
        return Fraction(found["decimal"].replace(",", "").removesuffix("."))
    whole, top, bottom = (int(found[part] or 0) for part in ("whole", "top", "bottom"))
    if bottom == 0 or (found["whole"] and top >= bottom):  # "5 24/8" is no way to write a number
        return None
    return whole + Fraction(top, bottom)


def grade(reply: str, answer: str, how: How = "strict") -> bool:
    """Whether the reply's answer is exactly the number of the worked solution `answer`."""
    final = extract_answer(answer)
    gold = None if final is None else number_of(final, point_is_decimal=True)
    if gold is None:
        raise ValueError(f"a solution must end in '{ANSWER_MARK} <number>', this one ends in {answer[-40:]!r}")
    given = extract_answer(reply, how)
    return given is not None and (given == final or number_of(given) == gold)


def true_share(solution: str) -> float:
    """Share of the steps of a solution that hold a true note: 0 to 1. Never raises.

    Steps are the lines before the answer. One without a note is not true either, and one with several needs all of
    them: a model rewarded for the share of its notes that are true learned to leave out those it was not sure of.
    """
    before_answer = takewhile(lambda line: not line.startswith(ANSWER_MARK), solution.split("\n"))
    steps = [line for line in before_answer if line.strip()]
    return sum(map(holds_true_notes, steps)) / len(steps) if steps else 0.0


def holds_true_notes(text: str) -> bool:
    """Whether a step or a reply has calculator notes, and all of them are true."""
    notes = NOTE.findall(text)
    return 0 < len(notes) == text.count(NOTE_MARK) and all(is_true(expression, value) for expression, value in notes)


def is_true(expression: str, value: str) -> bool:
    """Whether an expression of + - * / and brackets has this value: exactly, or rounded to decimals if it has any."""
    if not re.search(r"[0-9)][-+*/]", expression):
        return False  # 3=3 says nothing
    exact = evaluate(expression)
    if exact is None or not re.search("[0-9]", value):
        return False
    return abs(exact - Fraction(value)) <= Fraction(1, 2 * 10 ** len(value.partition(".")[2])) * ("." in value)
