import json
import time
from fractions import Fraction
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanollm.sources import gsm8k
from nanollm.sources.gsm8k import NOTE, extract_answer, grade, is_true, number_of, true_share

ANSWERS = {
    "He sold 48/2 = <<48/2=24>>24 clips.\n#### 1,080": "1,080",
    "Owed.\n#### -12": "-12",
    "Paid.\n#### 3.50": "3.50",
    "Paid.\n#### $5 ": "$5",
    "#### a mark inside\n#### 7": "7",
}


@pytest.fixture
def problems(tmp_path):
    for split in ("train", "test"):
        rows = [json.dumps({"question": f"{split}?", "answer": answer}) for answer in ANSWERS]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows))
    return tmp_path


@pytest.fixture(scope="module")
def all_problems(shared_data):
    return [each for split in ("train", "test") for each in gsm8k.problems([shared_data / "gsm8k"], split, pytest.fail)]


def test_a_problem_becomes_its_question_and_its_whole_solution(problems):
    talks = [each.conversation for each in gsm8k.problems([problems], "test", pytest.fail)]
    assert [talk.messages[0].content for talk in talks] == ["test?"] * len(ANSWERS)
    assert [talk.messages[1].content for talk in talks] == list(ANSWERS)
    assert [message.role for message in talks[0].messages] == ["user", "assistant"]


def test_a_solution_that_cannot_be_graded_is_a_bad_record(tmp_path):
    answers = ["#### 7", "no mark: 7", "#### seven", "empty ####", "#### 7 or 8", ""]
    rows = [json.dumps({"question": "?", "answer": answer}) for answer in answers]
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    bad = []
    assert [each.answer for each in gsm8k.problems([tmp_path], "train", bad.append)] == ["#### 7"]
    assert [record.line for record in bad] == [2, 3, 4, 5, 6]
    assert bad[1].reason == "answer must end in '#### <number>', got '#### seven'"
    assert bad[4].reason == "answer is empty"


def test_a_solution_of_the_hub_that_cannot_be_graded_is_a_bad_record(tmp_path):
    pytest.importorskip("datasets", reason='datasets is not installed: pip install -e ".[data]"')
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"question": ["Good?", "What is bad?"], "answer": ["#### 7", "#### seven"]})
    (tmp_path / "main").mkdir()
    pq.write_table(table, tmp_path / "main" / "train-00000-of-00001.parquet")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files:\n  - split: train\n    path: main/train-*\n---\n"
    )
    bad = []
    assert [each.question for each in gsm8k.problems(None, "train", bad.append, str(tmp_path))] == ["Good?"]
    assert len(bad) == 1
    assert "(question: 'What is bad?')" in str(bad[0])


@pytest.mark.parametrize(("solution", "answer"), ANSWERS.items())
def test_answers_are_kept_exactly(solution, answer):
    assert extract_answer(solution) == answer


@pytest.mark.parametrize(
    ("reply", "strict", "flexible"),
    [
        ("#### 24", "24", "24"),
        ("####24\nThat was easy, 100 %.", "24", "100"),
        ("So 5.\n##### 24 apples ", "24 apples", "24"),
        ("#### 24 or 25", "24 or 25", "25"),
        ("#### 24\n#### 25", "25", "25"),
        ("#### 24 #### 25", "25", "25"),
        ("#### 24\n####", None, "24"),
        ("#### \n24", None, "24"),
        ("It is 24.", None, "24."),
        ("It is $1,080.50, or not", None, "$1,080.50"),
        ("10-24", None, "24"),
        ("10 - -24%", None, "-24%"),
        ("about 1 1/2 of it", None, "1 1/2"),
        ("temperature: −3 degrees", None, "−3"),
        ("number " + 300 * "9", None, None),
        ("number " + 300 * "1,", None, "1"),
        ("no number, and ٢٤ is none of ours", None, None),
        ("", None, None),
    ],
)
def test_strict_takes_what_follows_the_last_mark_and_flexible_the_last_number(reply, strict, flexible):
    assert extract_answer(reply) == strict
    assert extract_answer(reply, "flexible") == flexible


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[("24", 24), (" 24 ", 24), ("024", 24), ("1,080", 1080), ("1,450,000", 1_450_000), ("1,080.", 1080)],
        *[("-3", -3), ("+4", 4), ("−3", -3), ("–3", -3), ("－3", -3), ("x = -3", -3), ("(-3)", -3)],
        *[("12.", 12), ("12.0", 12), (".5", "1/2"), ("-.5", "-1/2"), ("3.50", "7/2"), ("0.1", "1/10")],
        *[("3/4", "3/4"), ("-3/4", "-3/4"), ("6/8", "3/4"), ("1 1/2", "3/2"), ("1  1/2", "3/2"), ("-1 1/2", "-3/2")],
        *[("$5.50", "11/2"), ("-$5", -5), ("$-5", -5), ("$ 5", 5), ("€5", 5), ("5 dollars", 5), ("Rs.5", 5)],
        *[
            ("50%", 50),
            ("50 %", 50),
            ("24 apples", 24),
            ("24cm", 24),
            ("24 m²", 24),
            ("24-inch", 24),
            ("1234.567", "1234567/1000"),
        ],
        *[("**24**", 24), ("\\boxed{24}", 24), ("$24$", 24), ("<b>24</b>", 24), ("`24`.", 24), ("...24", 24)],
        *[("5 people and a dog", 5), ("9" * 200, int("9" * 200)), ("0." + "0" * 90 + "1", Fraction(1, 10**91))],
    ],
)
def test_the_value_of_one_number_is_exact(text, value):
    assert number_of(text) == Fraction(value)


@pytest.mark.parametrize(
    "text",
    [
        *["", " ", "x", "-", "$", "%", ".", ",", "/", "twenty-four", "٢٤", "２４", "½", "Ⅳ"],  # no number
        *["24 or 25", "24, 25", "2+3", "10-2", "2*3=6", "5:30", "1 080", "24 ٢", "1½", "5²", "2^3"],  # two
        *["1,08", "1,0800", "12345,678", "1.2.3", "1'080", "1_080", "1e3"],  # not how numbers are written here
        *["1/0", "3/4/5", "1.5/2", "5 24/8", "5 2/0"],
        *[
            "minus 5",
            "negative $5",
            "- 5",
            "-        5",
            "-(5)",
            "--5",
            "±5",
            "√16",
            "/5",
        ],  # another number than its digits
        *["5 million", "2 dozen", "5 and a half", "1.5 Thousand", "5k", "5 M", "5bn", "5 lakh", "5 crore", "5万"],
        *[
            "5th",
            "3rd",
            "5!",
            "5+",
            "5-",
            "(5)",
            "5...",
            "5…",
            "0.3̅",
            "5/day",
            "twice 5",
            "5 squared",
            "half of 5",
            "x5",
        ],
        *[
            "> 5",
            "≥5",
            "~5",
            "about 5",
            "at least 5",
            "5 or more",
            "less than 5",
            "up to 5",
            "5 to",
            "not 5",
            "5x",
            "5*x",
        ],
        *["\\frac34", "\\dfrac{5}{1}", "1{,}080", "1\\,080", "\\sqrt{5}", "5^{}", "1.080", "1.080.000", "5e3", "0x5"],
        *["9" * 201, "9" * 5000, "24" + " apples" * 50],
    ],
)
def test_what_is_not_exactly_one_number_has_no_value(text):
    assert number_of(text) is None
    assert not grade(f"#### {text}", "#### 5")


@pytest.mark.parametrize(
    ("reply", "answer", "is_right"),
    [
        ("#### 1080.0", "#### 1,080", True),
        ("#### $1,080", "#### 1080", True),
        ("#### 0.75", "#### 3/4", True),
        ("#### 0.33", "#### 1/3", False),
        ("#### 0.30000000000000001", "#### 0.3", False),
        ("#### 9007199254740993", "#### 9007199254740992", False),
        ("#### 50%", "#### 0.5", False),
        ("#### 3.142", "#### 3.142", True),  # another might read 3,142, but not where both write it so
        ("#### 3.142", "#### 3142", False),
        ("#### 24 or 25", "#### 24", False),
        ("#### 24 #### 25", "#### 24", False),
        ("24\n#### 25", "#### 24", False),
        ("24", "#### 24", False),
        ("", "#### 24", False),
    ],
)
def test_a_reply_is_right_if_its_number_is_exactly_that_of_the_solution(reply, answer, is_right):
    assert grade(reply, answer) is is_right


def test_flexible_needs_no_mark():
    assert grade("That makes 24.", "#### 24", "flexible")
    assert not grade("That makes 24, or 25?", "#### 24", "flexible")
    assert not grade("That makes 24 million, or 24k", "#### 24", "flexible")


UNREADABLE = (
    "{n}k",
    "{n}M",
    "{n} bn",
    "{n} lakh",
    "{n} million",
    "{o}",
    "{n}-{m}",
    "{n} to {m}",
    "at least {n}",
    "> {n}",
)
READABLE = ("{n}", "{c}", "${c}", "{n} apples", "{n}%", "{n}.0", "+{n}", "**{n}**", "\\boxed{{{n}}}", "= {n}", "{n} kg")
EITHER = (
    "{p}",
    "{thin}",
    "{apostrophe}",
    "{latex}",
    "\\frac{{{n}}}{{{m}}}",
    "{n} 1/2",
    "−{n}",
    "{n}.50",
    "({n})",
    "{n}⁄{m}",
)


def written(form, n, m):
    """A number in one of many notations, and its value; None: a reader may take it for nothing but that."""
    grouped = f"{n:,}"
    words = {
        "p": grouped.replace(",", "."),
        "thin": grouped.replace(",", "\u2009"),
        "latex": grouped.replace(",", "{,}"),
    }
    words |= {"apostrophe": grouped.replace(",", "'"), "c": grouped, "n": n, "m": m, "o": f"{n}{ordinal(n)}"}
    values = {"\\frac{{{n}}}{{{m}}}": Fraction(n, m), "{n} 1/2": n + Fraction(1, 2), "−{n}": -n, "({n})": -n}
    values |= {"{n}.50": n + Fraction(1, 2), "{n}⁄{m}": Fraction(n, m)}
    return form.format(**words), values.get(form, n)


def ordinal(n):
    return "th" if n % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")


@pytest.mark.parametrize("count", [5_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_no_notation_is_read_as_another_number(count):
    """Read exactly, or not at all."""
    rng = Random(5)
    for _ in range(count):
        n, m = rng.randrange(1, 10 ** rng.randrange(1, 8)), rng.randrange(2, 1000)
        form = rng.choice(UNREADABLE + READABLE + EITHER)
        text, value = written(form, n, m)
        expected = {None} if form in UNREADABLE else {value} if form in READABLE else {None, value}
        assert number_of(text) in expected, text


@pytest.mark.parametrize("solution", ["no mark: 7", "empty ####", "", "#### seven", "#### 7 or 8"])
def test_a_solution_without_a_number_grades_nothing(solution):
    with pytest.raises(ValueError, match="must end in '#### <number>', this one ends in"):
        grade(solution, solution)


@pytest.mark.realdata
def test_every_solution_is_right_about_itself(all_problems):
    assert len(all_problems) == 7_473 + 1_319
    for each in all_problems:
        assert grade(each.answer, each.answer)
        assert grade(each.answer, each.answer, "flexible")


@pytest.mark.realdata
def test_a_thousand_wrong_replies_are_wrong(all_problems):
    rng = Random(0)
    for number, each in enumerate(rng.sample(all_problems, 1000)):
        steps, _, final = each.answer.rpartition("#### ")
        gold = number_of(final)
        off = f"{gold + rng.choice([-1, 1, Fraction(1, 100), 10])}"
        other = next(
            found
            for found in (extract_answer(rng.choice(all_problems).answer) for _ in range(100))
            if number_of(found) != gold
        )
        wrong = [
            f"{steps}#### {off}",
            f"{steps}#### {other}",
            f"{each.answer}\n#### {other}",
            f"{steps}{final}\n#### {other}",
            f"{steps}#### {final} or {other}",
        ][number % 5]
        assert not grade(wrong, each.answer), wrong
        assert not grade(wrong, each.answer, "flexible"), wrong


PIECES = (
    *("####", "#### ", "\n", " ", "-", "−", "+", "/", ".", ",", "$", "%", "0", "1", "24", "1,080", "3/4", "1 1/2"),
    *("9" * 5000, "1," * 3000, ",000" * 2000, "-" * 3000, "1 " * 3000, "1/" * 3000, " " * 5000, "." * 3000, "#" * 4001),
    *("1/0", "apples", "minus ", "million", "½", "²", "٢٤", "\ud800", "\x00", "\u2028", "a\u0301", "😀", "<|end|>"),
)


def random_reply(rng):
    """Up to 10,000 characters, from the pieces that answers are made of and from all of Unicode."""
    pieces = rng.choices(PIECES, k=rng.choice([1, 3, 10, 100]))
    pieces += ["".join(chr(rng.randrange(0x110000)) for _ in range(rng.randrange(20))), rng.choice(PIECES)]
    return "".join(pieces)[: rng.choice([50, 10_000])]


def use_everything(reply):
    for how in ("strict", "flexible"):
        extract_answer(reply, how)
        grade(reply, "#### 24", how)
    number_of(reply)


def test_no_reply_makes_the_grader_fail_or_slow():
    rng = Random(1)
    started = time.thread_time()
    for _ in range(4000):
        use_everything(random_reply(rng))
    assert time.thread_time() - started < 4  # a millisecond each, on average


# Calculator notes.


@pytest.mark.parametrize(
    ("solution", "expected"),
    [
        ("6*8=<<6*8=48>>48", 1),
        ("<<6*8=48>>\n<<48-9=36>>\n#### 36", 0.5),
        ("<<6*8=48>> <<48-9=36>>", 0),  # one step
        ("<<6*8=48>> <<48-9=39>>", 1),
        ("6*8=48>>48\n<<48-9=39>>39\n#### 39", 0.5),  # a step without a note is not true
        ("<<3=3>>", 0),
        ("<<-3=-3>>", 0),
        ("<<(3+4)*2=14>>", 1),
        ("<<3+4*2=14>>", 0),
        ("<<10/3=3.33>>", 1),  # rounded as it is written
        ("<<10/3=3>>", 0),
        ("<<10/3=3.34>>", 0),
        ("<<.5*6=3>>", 1),
        ("<<3-5=-2>>", 1),
        ("<<1/0=0>>", 0),
        ("<<9**9**9=1>>", 0),
        ("<<2+2=4", 0),  # never closed
        ("<<two+2=4>>", 0),
        ("<<07+1=8>>", 0),
        ("48", 0),
        ("", 0),
    ],
)
def test_a_note_counts_when_it_is_true(solution, expected):
    assert true_share(solution) == expected


@given(st.text(alphabet="<>0123456789+-*/().= ", max_size=200))
def test_whatever_is_written_there_is_an_answer(solution):
    assert 0 <= true_share(solution) <= 1


@pytest.mark.realdata
def test_nearly_all_notes_of_gsm8k_are_true(shared_data):
    lines = (shared_data / "gsm8k" / "train.jsonl").read_text("utf-8").splitlines()
    notes = [note for line in lines for note in NOTE.findall(json.loads(line)["answer"])]
    assert len(notes) > 20_000
    assert sum(is_true(*note) for note in notes) / len(notes) > 0.95  # some are rounded in their own way
