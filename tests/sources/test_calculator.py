"""Calculator notes are checked exactly."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanollm.sources.calculator import NOTE, is_true, true_share


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
