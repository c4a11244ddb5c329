"""Prose checks of README and docs/: phrases that must not come back, proselint's findings, and the length of sentences.

    python -m tests.prose          # prints every finding; part of `make check` through tests/test_house.py

Code, inline code and the targets of links are left out.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
CODE = re.compile(r"^```.*?^```[^\n]*$|~~~.*?~~~|<!--.*?-->|`[^`\n]*`|\]\([^)\s]*\)", re.DOTALL | re.MULTILINE)

PHRASES = re.compile(
    r"""\b(
    (go|goes|going|went|gone)\ on(?!\ to\b)       # resumes, continues
    | (is|are|be|was)\ said | says?\ so | is\ told | told\ apart | (foretell|foretold)\w*
    | nobody | somebody | whoever | whomever | whom | ones?['’]?s?\ own | of\ others | a\ fault\ of\ ours
    | at\ hand | beside(?!s) | anew | in\ vain | as\ ever | without\ end | for\ real | comes\ to\ (its|an)\ end
    | reckon\w* | mend(s|ed|ing)? | heeded | dearest | likelier | shall | what\ comes\ of
    | (lies?|stands?)\ (in|behind|before|there) | is\ answered\ with | the\ other\ way\ about | takes?\ for\ right
    | (?P<twice>[a-z]+)\ (?P=twice)
    )\b""",
    re.VERBOSE | re.IGNORECASE,
)
"""What a native reader stumbled over: literal translations, and words that hide who does what."""

OFF = ("annotations", "lexical_illusions", "typography")
"""Checks of proselint that blanked code or plain ASCII set off."""


def documents() -> list[Path]:
    """README, the other pages at the top, and every page of docs/."""
    return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def prose_of(text: str) -> str:
    """The text with code blanked character by character, so that line numbers stay the same."""
    return CODE.sub(lambda code: re.sub(r"[^\n]", " ", code[0]), text)


def phrases_in(text: str) -> Iterator[str]:
    prose = prose_of(text)
    for found in PHRASES.finditer(prose):
        yield f"{prose.count(chr(10), 0, found.start()) + 1}: {found[0]!r}"


def lint(text: str) -> Iterator[str]:
    """The findings of proselint."""
    from proselint.checks import __register__
    from proselint.config import DEFAULT
    from proselint.registry import CheckRegistry
    from proselint.tools import LintFile

    if not CheckRegistry().checks:
        CheckRegistry().register_many(__register__)
    config = {**DEFAULT, "checks": {name: on and name not in OFF for name, on in DEFAULT["checks"].items()}}
    file = LintFile("prose", prose_of(text))
    for each in file.lint(config):
        yield f"{each.pos[0]}: {each.check_result.check_path}: {each.check_result.message}"


def sentences(text: str) -> list[list[str]]:
    """The words of each sentence in paragraphs and lists; code counts as one word, tables and headings are left out."""
    text = re.sub(r"^```.*?^```[^\n]*$", "\n", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"`[^`\n]*`", "code", re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text))
    blocks = re.split(r"\n\s*\n|\n(?=[-|#])", text)
    paragraphs = [" ".join(block.split()) for block in blocks if block.strip() and block.strip()[0] not in "|#!"]
    found = [re.findall(r"\w[\w'.,/-]*", each) for block in paragraphs for each in re.split(r"(?<=[.!?])\s+", block)]
    return [words for words in found if words]


def main() -> int:
    found = 0
    for file in documents():
        text = file.read_text(encoding="utf-8")
        for finding in [*phrases_in(text), *lint(text)]:
            found += 1
            print(f"{file.relative_to(ROOT)}:{finding}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
