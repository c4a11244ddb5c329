"""One set of commands for every operating system: `python make.py setup|demo|test|check|docs|...`.

Needs nothing but the standard library. The environment is .venv beside this file. `demo` installs the core there: what
training, sampling and chatting need. Every other command adds all extras and the tools of the tests. uv installs where
it is on PATH, pip otherwise, both the versions in requirements.txt. What is installed already starts at once, without a
network. Words after the command are handed on: `python make.py test -k tokenizer`.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

# A Python as old as 3.6 must be able to read this file and say that it is too old: hence the quoted types.

HERE = Path(__file__).resolve().parent
VENV = HERE / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
STAMP = VENV / "installed-from"  # where .venv was made, the level that is installed, the fingerprint of the pins
PINS = "requirements.txt"  # relative: pip splits PIP_CONSTRAINT at the spaces of a path
LEVELS = {"core": 900, "all": 2300}  # the MB that each takes; all includes core
HALF = "half"  # the level until everything is there
OLDEST = (3, 11)
KNOWN = ("3.13", "3.12", "3.14", "3.11")  # in order of preference
MIRRORS = {"UV_DEFAULT_INDEX": "PIP_INDEX_URL", "UV_INDEX": "PIP_EXTRA_INDEX_URL", "UV_FIND_LINKS": "PIP_FIND_LINKS"}


def setup(words: "list[str]", level: str = "all") -> int:
    """Install everything in .venv, unless it is there; words go to pip or uv."""
    place, installed, pins = read_stamp()
    if is_new_enough(str(PYTHON)) and place in ("", str(VENV)):
        if installed in (level, "all") and pins == fingerprint():
            return 0
    elif VENV.exists():
        say("making .venv anew: it comes from another place, or its Python is missing or too old")
        shutil.rmtree(str(VENV))
    if not (with_uv(level, words) or with_pip(level, words)):
        return 1
    write_stamp(level)
    say(f"ready: {PYTHON.parent.relative_to(HERE)}")
    return 0


def with_uv(level: str, words: "list[str]") -> bool:
    """Install with uv; False where there is none, or where it fails."""
    uv = shutil.which("uv")
    if not uv:
        return False
    # uv reads none of pip's settings. Whoever names a mirror gets all from there; otherwise the torch that fits the
    # GPU comes from PyTorch's own index, and where there is no GPU, without the CUDA libraries.
    given = {name: ",".join(os.environ[pips].split()) for name, pips in MIRRORS.items() if pips in os.environ}
    given = {name: value for name, value in given.items() if name not in os.environ}
    if not given and not any(name in os.environ for name in (*MIRRORS, "UV_INDEX_URL", "UV_TORCH_BACKEND")):
        given["UV_TORCH_BACKEND"] = "auto"
    say(f"installing {level} with uv")
    what = ["-r", PINS] if level == "all" else ["-c", PINS]
    again = ["--reinstall"] * is_half_installed()
    install = [uv, "pip", "install", "--python", str(PYTHON), *again, *what, "-b", PINS, *words, "pip", "-e", "."]
    if PYTHON.exists() or run([uv, "venv", "--quiet", "--python", find_python(), str(VENV)]) == 0:
        write_stamp(HALF)
        if run(install, **given) == 0:
            return True
    say("uv failed, the lines above say why; pip does it instead")
    return False


def with_pip(level: str, words: "list[str]") -> bool:
    """Install with pip; where it fails, the last line says what to do."""
    if not works(str(PYTHON), "import pip"):
        python = find_python()
        if not works(python, "import ensurepip, venv"):
            fail(f"{python} has no venv or no ensurepip; on Debian and Ubuntu: sudo apt install python3-venv")
            return False
        say(f"making .venv with {python}")
        if run([python, "-m", "venv", str(VENV)]):
            fail(f"making .venv failed; {reason(level)}")
            return False
    say(f"installing {level} with pip (some minutes; uv, where it is on PATH, takes a fraction of that)")
    # The packages that build ours are pinned as well: by the first name for a pip before 25.3, then by the second.
    pinned = {"PIP_CONSTRAINT": f"{os.environ.get('PIP_CONSTRAINT', '')} {PINS}".strip(), "PIP_BUILD_CONSTRAINT": PINS}
    install = [str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--no-compile", *words]
    install += ["--force-reinstall"] * is_half_installed()
    write_stamp(HALF)
    steps = {"core": [["-e", "."]], "all": [["-r", PINS], ["--no-deps", "--no-build-isolation", "-e", "."]]}[level]
    if any(run([*install, *step], **pinned) for step in steps):
        fail(f"installing failed; {reason(level)}")
        return False
    return True


def reason(level: str) -> str:
    """What may be behind a failure: a disk that is full, or something that only the installer knows."""
    places = [str(HERE), *(os.environ.get(name, "") for name in ("TMPDIR", "TEMP")), "/tmp"]
    for place in filter(os.path.isdir, places):
        free = shutil.disk_usage(place).free // 10**6
        if free < LEVELS[level]:
            return f"the disk may be full: {place} has {free:,} MB left, and this takes {LEVELS[level]:,}. Make room"
    return "the lines above say why. The same command tries again; if that is in vain, remove .venv first"


def demo(words: "list[str]") -> int:
    """Tokenizer, token files, model, samples: the whole journey on built-in text."""
    return setup([], "core") or run([str(PYTHON), "-m", "nanollm", "demo", *words])


def test(words: "list[str]") -> int:
    """The tests, on several cores. One thread per worker, or they fight over the cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    command = [str(PYTHON), "-m", "pytest", "-n", str(min(cores, 4)), *words]
    return setup([]) or run(command, OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")


def check(words: "list[str]") -> int:
    """Style, format, types, floor plan and prose; all of them, even if one fails."""
    if setup([]):
        return 1
    house = ["tests/test_floor_plan.py", "tests/test_house.py", "tests/test_size.py"]
    checks = [["ruff", "check"], ["ruff", "format", "--check"], ["mypy"], ["pytest", "-q", *house], ["tests.test_size"]]
    failed = [" ".join(command) for command in checks if run([str(PYTHON), "-m", *command, *words])]
    return fail(f"not clean: {'; '.join(failed)}") if failed else 0


def docs(words: "list[str]") -> int:
    """The site of docs/ and of the reference that the code writes, in site/; a link that leads nowhere ends it."""
    return setup([]) or run([str(PYTHON), "-m", "docs.build", *words])


def figures(words: "list[str]") -> int:
    """Draw the charts of docs/concepts anew."""
    return setup([]) or run([str(PYTHON), "docs/figures/draw.py", *words])


def bench(words: "list[str]") -> int:
    """Speed beside others on this machine: everything that needs no GPU, or the benchmarks named."""
    return setup([]) or run([str(PYTHON), "benchmarks/run.py", *words])


def faults(words: "list[str]") -> int:
    """Break all that can break; without further words the figures go into docs/reliability.md (half an hour)."""
    with tempfile.TemporaryDirectory() as folder:
        told = str(Path(folder) / "junit.xml")
        failed = test(["tests/faults", "-m", "not gpu", f"--junitxml={told}", *words])
        if failed:
            return failed
        return 0 if words else run([str(PYTHON), "-m", "tests.faults.report", told])


def soak(words: "list[str]") -> int:
    """An hour of training and serving, with nothing beside it; its figures go into docs/reliability.md."""
    failed = setup([])
    if failed:
        return failed
    figures = HERE / "tests" / "faults" / "figures"
    figures.mkdir(exist_ok=True)
    ends = [
        run([str(PYTHON), "-m", f"tests.faults.{name}", "--json", str(figures / f"{name}.json"), *words])
        for name in ("training_soak", "server_soak")
    ]
    return run([str(PYTHON), "-m", "tests.faults.report"]) or max(ends)


def write_stamp(level: str) -> None:
    STAMP.write_text("\n".join((str(VENV), level, fingerprint())), encoding="utf-8")


def is_half_installed() -> bool:
    """Whether an installation has begun and not ended: a package may look installed, and lack files."""
    return read_stamp()[1] == HALF


def read_stamp() -> "tuple[str, str, str]":
    """What STAMP says; empty where there is none, as in an environment that the user made."""
    if not STAMP.exists():
        return "", "", ""
    place, level, pins, *_ = [*STAMP.read_text(encoding="utf-8").splitlines(), "", "", ""]
    return place, level, pins


def fingerprint() -> str:
    """Changes with the files that decide what is installed."""
    return hashlib.sha256(b"".join((HERE / name).read_bytes() for name in ("pyproject.toml", PINS))).hexdigest()


def find_python() -> str:
    """This Python, or a newer one from PATH if this one is too old."""
    if sys.version_info[:2] >= OLDEST:
        return str(getattr(sys, "_base_executable", sys.executable))  # not the one of .venv, which may be in the way
    for version in KNOWN:
        path = shutil.which(f"python{version}")
        if path and is_new_enough(path):
            return path
    asked = ".".join(map(str, OLDEST))
    sys.exit(f"make.py: NanoLLM needs Python {asked} or newer, this is {sys.version.split()[0]} and PATH has no other")


def is_new_enough(python: str) -> bool:
    return works(python, f"import sys; sys.exit(sys.version_info[:2] < {OLDEST})")


def works(python: str, code: str) -> bool:
    nowhere = subprocess.DEVNULL
    try:
        return subprocess.run([python, "-c", code], check=False, stdout=nowhere, stderr=nowhere).returncode == 0
    except OSError:
        return False


def run(command: "list[str]", **variables: str) -> int:
    env = {**os.environ, **variables}
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # packages come uncompiled: every process would compile PyTorch once more
    return subprocess.run(command, cwd=HERE, env=env, check=False).returncode


def say(text: str) -> None:
    print(f"make.py: {text}", file=sys.stderr, flush=True)


def fail(text: str) -> int:
    say(text)
    return 1


COMMANDS = {each.__name__: each for each in (setup, demo, test, check, docs, figures, bench, faults, soak)}


def main(words: "list[str]") -> int:
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
