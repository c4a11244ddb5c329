"""Which calculator notes of a worked solution are true?

GSM8K (arXiv:2110.14168) writes each calculation as a note, 48/2=<<48/2=24>>24. A note can be checked exactly without
knowing the problem, so a solution can be judged step by step.
"""

import ast
import operator
import re
from collections.abc import Callable, Mapping
from fractions import Fraction

NOTE = re.compile(r"<<([0-9+*/().-]{1,60})=(-?[0-9]{0,20}(?:\.[0-9]{1,20})?)>>")
MARK = "<<"
OPERATORS: Mapping[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def true_share(solution: str) -> float:
    """Share of the notes in a solution that are true: 0 to 1, and 0 where there is none. Never raises."""
    notes = solution.count(MARK)
    return sum(is_true(expression, value) for expression, value in NOTE.findall(solution)) / notes if notes else 0.0


def is_true(expression: str, value: str) -> bool:
    """Whether an expression of + - * / and brackets has this value, to the decimals that are written."""
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
