"""Take the pictures of the pages, in a headless Chromium:

    python docs/figures/screenshots.py --chat BUNDLE --name nano-20m-grpo    chat-light.png and chat-dark.png
    python docs/figures/screenshots.py --report RUN                          report-light.png and report-dark.png

BUNDLE: a model that replies; --ask gives it other questions. RUN: a folder with the report.html of `nanollm report`.
A page that complains, or asks for anything but itself, is an error. Needs playwright and Debian's chromium.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--hide-scrollbars")
SIZE = {"width": 1100, "height": 800}
# Stories of the word problems, with numbers of their split `test`, which no model has trained on.
QUESTIONS = (
    "Sam finds 3 stamps and Emma finds 5. They share them equally among 2 friends. How many does each friend get?",
    "Tom reads 4 pages a day for 4 days. The book has 22 pages. How many pages are left to read?",
)
REPLIED = ".exchange:nth-child({}):not([data-status=waiting]):not([data-status=streaming])"


def main(words: Sequence[str]) -> int:
    """Exit status: 0 taken, 2 they cannot be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chat", type=Path, metavar="BUNDLE", help="model to talk to")
    parser.add_argument("--name", default="nanollm", help="what the page calls the model")
    parser.add_argument("--ask", nargs="+", default=QUESTIONS, metavar="QUESTION", help="the last is looked into")
    parser.add_argument("--report", type=Path, metavar="RUN", help="folder with a report.html")
    parser.add_argument("--out", type=Path, default=HERE, help="where the pictures go")
    o = parser.parse_args(words)
    try:
        if not (o.chat or o.report):
            raise ValueError("nothing to look at: give --chat BUNDLE or --report RUN")
        with browser() as chromium:
            if o.chat:
                with serving(o.chat, o.name) as address:
                    chat(chromium, address, o.ask, o.out)
            if o.report:
                report(chromium, o.report / "report.html", o.out)
    except (OSError, ValueError) as problem:
        print(problem, file=sys.stderr)
        return 2
    return 0


@contextmanager
def browser() -> Iterator[Any]:
    """A Chromium of this machine, without a window."""
    from playwright.sync_api import sync_playwright  # late: --help must not need it

    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        raise ValueError("there is no Chromium on this machine: apt-get install chromium")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=list(FLAGS))
        yield chromium
        chromium.close()


@contextmanager
def opened(chromium: Any, address: str, scheme: str) -> Iterator[Any]:
    """A page in the light or the dark; ValueError if it complained, or asked for what is not its own."""
    complaints: list[str] = []
    context = chromium.new_context(viewport=SIZE, color_scheme=scheme)
    page = context.new_page()
    page.set_default_timeout(120_000)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda entry: complaints.append(entry.text) if entry.type in ("error", "warning") else None)
    page.on("request", lambda asked: None if asked.url.startswith((address, "data:")) else complaints.append(asked.url))
    page.goto(address)
    yield page
    context.close()
    if complaints:
        raise ValueError(f"{address} complained: {'; '.join(complaints)}")


# --- the chat page ---


@contextmanager
def serving(bundle: Path, name: str) -> Iterator[str]:
    """`nanollm serve` in a process of its own, and its address."""
    command = [sys.executable, "-m", "nanollm", "serve", str(bundle), "--port", "0", "--model_name", name]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            address = server.stdout.readline().strip()
            if not address.startswith("http"):
                raise ValueError(f"{bundle} was not served; nanollm serve {bundle} says why")
            yield address
        finally:
            server.terminate()


def chat(chromium: Any, address: str, questions: Sequence[str], out: Path) -> None:
    """All questions but the last in the light, and the last in the dark, with a look inside its least likely token."""
    with opened(chromium, address, "light") as page:
        prepare(page)
        ask(page, questions[:-1] or questions)
        save(page, out / "chat-light.png")
    with opened(chromium, address, "dark") as page:
        prepare(page)
        page.click("#inside")
        ask(page, questions[-1:])
        tokens = page.locator(".token")
        surprise = "spans => spans.map(span => Number(span.style.getPropertyValue('--surprise')))"
        surprises = tokens.evaluate_all(surprise)
        if not surprises:
            raise ValueError(f"the model said nothing to {questions[-1]!r}; --ask something else")
        tokens.nth(surprises.index(max(surprises))).click()
        page.wait_for_selector(".route .block")
        save(page, out / "chat-dark.png")


def prepare(page: Any) -> None:
    """A fixed seed, so that the pictures can be taken again."""
    kept = json.dumps({"seed": 5, "temperature": 0.8, "max_tokens": 100})
    page.evaluate("kept => localStorage.setItem('nanollm.settings', kept)", kept)
    page.reload()
    page.locator("#model-name", has_text=re.compile(".")).wait_for()


def ask(page: Any, questions: Sequence[str]) -> None:
    """One after the other, each when the one before is answered."""
    for number, question in enumerate(questions, start=1):
        page.fill("#message", question)
        page.keyboard.press("Enter")
        page.wait_for_selector(REPLIED.format(number))


# --- the report ---


def report(chromium: Any, file: Path, out: Path) -> None:
    """The first screens of the report."""
    if not file.is_file():
        raise ValueError(f"{file} is not there: nanollm report {file.parent}")
    for scheme in ("light", "dark"):
        with opened(chromium, file.resolve().as_uri(), scheme) as page:
            page.set_viewport_size({"width": SIZE["width"], "height": 1200})
            save(page, out / f"report-{scheme}.png")


def save(page: Any, file: Path) -> None:
    page.screenshot(path=file, animations="disabled")
    print(file)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
