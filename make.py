"""One set of commands for every operating system: `python make.py setup|demo|test|check|docs|...`.

Needs nothing but the standard library. The environment is made in .venv beside this file when it is missing or when
pyproject.toml or requirements.txt have changed; otherwise a command starts at once. Words after the command are handed
on: `python make.py test -k tokenizer`.
"""

from __future__ import annotations  # an old Python must be able to read this file and say that it is too old

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
VENV = HERE / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
STAMP = VENV / "installed-from"
OLDEST = (3, 11)
KNOWN = ("3.13", "3.12", "3.14", "3.11")  # in order of preference


def setup(words: list[str]) -> int:
    """Make the environment, unless it is there and up to date."""
    if is_up_to_date():
        return 0
    python = find_python()
    if not is_new_enough(str(PYTHON)):
        say(f"making .venv with {python}")
        made = run([python, "-m", "venv", "--clear", str(VENV)])
        if made != 0:
            return fail(f"{python} -m venv failed; on Debian and Ubuntu: sudo apt install python3-venv")
    say("installing the pinned packages (some minutes the first time)")
    pip = [str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check", "--no-input", *words]
    if run([*pip, "-r", "requirements.txt"]) or run([*pip, "--no-deps", "--no-build-isolation", "-e", "."]):
        return fail("installing failed; the lines above say why. The same command tries again")
    STAMP.write_text(fingerprint(), encoding="utf-8")
    say(f"ready: {PYTHON.parent.relative_to(HERE)}")
    return 0


def demo(words: list[str]) -> int:
    """Tokenizer, token files, model, samples: the whole journey on built-in text."""
    return setup([]) or run([str(PYTHON), "-m", "nanollm", "demo", *words])


def test(words: list[str]) -> int:
    """The tests, on several cores. One thread per worker, or they fight over the cores."""
    workers = str(max(2, min(os.cpu_count() or 1, 4)))
    command = [str(PYTHON), "-m", "pytest", "-n", workers, *words]
    return setup([]) or run(command, OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")


def check(words: list[str]) -> int:
    """Style, format, types and floor plan; all of them, even if one fails."""
    if setup([]):
        return 1
    house = ["tests/test_floor_plan.py", "tests/test_house.py"]
    checks = [["ruff", "check"], ["ruff", "format", "--check"], ["mypy"], ["pytest", "-q", *house]]
    failed = [" ".join(command) for command in checks if run([str(PYTHON), "-m", *command, *words])]
    return fail(f"not clean: {'; '.join(failed)}") if failed else 0


def docs(words: list[str]) -> int:
    """The site of docs/ and of the reference that the code writes, in site/; a link that leads nowhere ends it."""
    return setup([]) or run([str(PYTHON), "-m", "docs.build", *words])


def figures(words: list[str]) -> int:
    """Draw the pictures of README.md and docs/ anew."""
    return setup([]) or run([str(PYTHON), "docs/figures/draw.py", *words])


def bench(words: list[str]) -> int:
    """Speed beside others on this machine: everything that needs no GPU, or the benchmarks named."""
    return setup([]) or run([str(PYTHON), "benchmarks/run.py", *words])


def faults(words: list[str]) -> int:
    """Break all that can break; without further words the figures go into docs/reliability.md (half an hour)."""
    with tempfile.TemporaryDirectory() as folder:
        told = str(Path(folder) / "junit.xml")
        if failed := test(["tests/faults", "-m", "not gpu", f"--junitxml={told}", *words]):
            return failed
        return 0 if words else run([str(PYTHON), "-m", "tests.faults.report", told])


def soak(words: list[str]) -> int:
    """An hour of training and serving, with nothing beside it; its figures go into docs/reliability.md."""
    if failed := setup([]):
        return failed
    figures = HERE / "tests" / "faults" / "figures"
    figures.mkdir(exist_ok=True)
    ends = [
        run([str(PYTHON), "-m", f"tests.faults.{name}", "--json", str(figures / f"{name}.json"), *words])
        for name in ("training_soak", "server_soak")
    ]
    return run([str(PYTHON), "-m", "tests.faults.report"]) or max(ends)


def is_up_to_date() -> bool:
    return PYTHON.exists() and STAMP.exists() and STAMP.read_text(encoding="utf-8") == fingerprint()


def fingerprint() -> str:
    """Changes with the files that decide what is installed, and with the place of the environment."""
    files = (HERE / name for name in ("pyproject.toml", "requirements.txt"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files) + str(VENV).encode()).hexdigest()


def find_python() -> str:
    """This Python, or a newer one from PATH if this one is too old."""
    if sys.version_info[:2] >= OLDEST:
        return sys.executable
    for version in KNOWN:
        path = shutil.which(f"python{version}")
        if path and is_new_enough(path):
            return path
    asked = ".".join(map(str, OLDEST))
    sys.exit(f"make.py: NanoLLM needs Python {asked} or newer, this is {sys.version.split()[0]} and PATH has no other")


def is_new_enough(python: str) -> bool:
    test = f"import sys; sys.exit(sys.version_info[:2] < {OLDEST})"
    try:
        return subprocess.run([python, "-c", test], check=False, capture_output=True).returncode == 0
    except OSError:
        return False


def run(command: list[str], **variables: str) -> int:
    return subprocess.run(command, cwd=HERE, env={**os.environ, **variables}, check=False).returncode


def say(text: str) -> None:
    print(f"make.py: {text}", file=sys.stderr, flush=True)


def fail(text: str) -> int:
    say(text)
    return 1


COMMANDS = {each.__name__: each for each in (setup, demo, test, check, docs, figures, bench, faults, soak)}


def main(words: list[str]) -> int:
    if not words or words[0] not in COMMANDS:
        print(__doc__, file=sys.stderr)
        for name, command in COMMANDS.items():
            print(f"  {name:<9}{command.__doc__}", file=sys.stderr)
        return 2
    try:
        return COMMANDS[words[0]](words[1:])
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
