"""The calculator of GSM8K's notes: where a solution says "<<48/2=", it goes on with "24>>".

A model that has learnt when to calculate, and what, need not know arithmetic. Source: arXiv:2110.14168, section 4.1.
"""

import ast
import operator
import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from fractions import Fraction

OPEN_NOTE = re.compile(r"<<([0-9+*/(). -]{1,60})=\Z")
MAX_DIGITS = 12
"""Of a result before its point; a longer one is not written."""
OPERATORS: Mapping[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def calculator(reply: str) -> str:
    """What follows a reply that has just opened a note: its value and ">>", or "" where there is nothing to say.

    That is so behind any other text, and for an expression that is not of + - * / and brackets, divides by zero or has
    more than 60 characters. A value with more than four decimals is rounded to two, as GSM8K writes it. Never raises.
    """
    if not reply.endswith("=") or not (note := OPEN_NOTE.search(reply[-64:])):
        return ""
    value = evaluate(note[1])
    return "" if value is None or abs(value) >= 10**MAX_DIGITS else f"{written(value)}>>"


def evaluate(expression: str) -> Fraction | None:
    """The exact value of numbers with + - * / and brackets between them; None for anything else. Never raises."""
    try:
        return _value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr) -> Fraction:
    match node:
        case ast.BinOp(left, op, right) if type(op) in OPERATORS:
            return OPERATORS[type(op)](_value(left), _value(right))
        case ast.UnaryOp(ast.USub(), operand):
            return -_value(operand)
        case ast.Constant(int() | float()):
            return Fraction(ast.unparse(node))
    raise ValueError("a note holds numbers and + - * / only")


def written(value: Fraction) -> str:
    """24, -3, 0.125; rounded to two decimals, which then stay, 33.33 for 100/3 and 3.00 for 299999/100000."""
    is_exact = (value * 10_000).denominator == 1
    places = 4 if is_exact else 2
    text = f"{Decimal(round(value * 10**places)).scaleb(-places):f}"
    return text.rstrip("0").rstrip(".") if is_exact else text
