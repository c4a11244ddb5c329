"""The calculator says what GSM8K's notes say, and nothing where it cannot read."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanollm.sources.calculator import calculator
from nanollm.sources.gsm8k import is_true


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("Tom has 5*3=<<5*3=", "15>>"),
        ("<<48/2=", "24>>"),
        ("<<(2+3)*4=", "20>>"),
        ("<<1.5*3=", "4.5>>"),
        ("<<100*.2=", "20>>"),
        ("<<3-5=", "-2>>"),
        ("<<1/8=", "0.125>>"),
        ("<<100/3=", "33.33>>"),
        ("<<0.1+0.2=", "0.3>>"),
        ("<<1/201=", "0.00>>"),
        ("<<599/200.01=", "2.99>>"),
        ("<<12 + 3=", "15>>"),
    ],
)
def test_a_note_that_was_opened_gets_its_value(reply, expected):
    assert calculator(reply) == expected


UNREADABLE = """= 5*3= <<5*3 <<5*3=15 <<1/0= <<9**9**9= <<"a"*10**9= <<a+b= <<= <<5*= <<((((= <<5//2= <<1_000*2= <<007=
    <<1e9*2="""
TOO_LONG = ["<<" + "9*" * 40 + "9=", "<<" + "9" * 60 + "=", "<<" + "(" * 60 + "="]


@pytest.mark.parametrize("reply", ["", "<<5*3=\n", *UNREADABLE.split(), *TOO_LONG])
def test_what_it_cannot_read_gets_nothing(reply):
    assert calculator(reply) == ""


@given(st.integers(0, 999), st.sampled_from("+-*/"), st.integers(1, 999))
def test_every_note_that_it_completes_is_true(a, operator, b):
    result = calculator(f"<<{a}{operator}{b}=").removesuffix(">>")
    assert is_true(f"{a}{operator}{b}", result)
    assert len(result.partition(".")[2]) <= 4
