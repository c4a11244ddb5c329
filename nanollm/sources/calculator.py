"""Which calculator notes of a worked solution are true?

GSM8K (arXiv:2110.14168) writes each calculation as a note, 48/2=<<48/2=24>>24. A note can be checked exactly without
knowing the problem, so a solution can be judged step by step.
"""

import ast
import operator
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from itertools import takewhile

from nanollm.sources.gsm8k import ANSWER_MARK

NOTE = re.compile(r"<<([0-9+*/().-]{1,60})=(-?[0-9]{0,20}(?:\.[0-9]{1,20})?)>>")
MARK = "<<"
OPERATORS: Mapping[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def true_share(solution: str) -> float:
    """Share of the steps of a solution that hold a true note: 0 to 1. Never raises.

    Steps are the lines before the answer. One without a note is not true either, and one with several needs all of
    them: a model rewarded for the share of its notes that are true learned to leave out those it was not sure of.
    """
    before_answer = takewhile(lambda line: not line.startswith(ANSWER_MARK), solution.split("\n"))
    steps = [line for line in before_answer if line.strip()]
    return sum(map(_holds_true_notes, steps)) / len(steps) if steps else 0.0


def _holds_true_notes(step: str) -> bool:
    notes = NOTE.findall(step)
    return 0 < len(notes) == step.count(MARK) and all(is_true(expression, value) for expression, value in notes)


def is_true(expression: str, value: str) -> bool:
    """Whether an expression of + - * / and brackets has this value: exactly, or rounded to decimals if it has any."""
    if not re.search(r"[0-9)][-+*/]", expression):
        return False  # 3=3 says nothing
    try:
        exact, written = _value(ast.parse(expression, mode="eval").body), Fraction(value)
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return False
    return abs(exact - written) <= Fraction(1, 2 * 10 ** len(value.partition(".")[2])) * ("." in value)


def _value(node: ast.expr) -> Fraction:
    match node:
        case ast.BinOp(left, op, right) if type(op) in OPERATORS:
            return OPERATORS[type(op)](_value(left), _value(right))
        case ast.UnaryOp(ast.USub(), operand):
            return -_value(operand)
        case ast.Constant(int() | float()):
            return Fraction(ast.unparse(node))
    raise ValueError("a note holds numbers and + - * / only")
