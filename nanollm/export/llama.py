"""What does llama.cpp make of a GGUF file?

llama.cpp runs inside Node.js, where the package node-llama-cpp brings it ready built for every system.
"""

import json
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SCRIPT = Path(__file__).with_name("llama.mjs")
PACKAGE = Path("node_modules", "node-llama-cpp")
INSTALL = "npm install node-llama-cpp"

Ids = Sequence[int]


@dataclass(frozen=True)
class Score:
    """How llama.cpp saw one position of a text."""

    top: int
    """The likeliest token."""
    top_logit: float
    logit: float
    """Of the token that follows in the text."""
    log_total: float
    """Logarithm of the sum of all exponentials: logit - log_total is the log-probability."""


@dataclass(frozen=True)
class Answer:
    """What was found out; each list in the order of the question."""

    ids: list[list[int]]
    ids_with_marks: list[list[int]]
    scores: list[list[Score]]
    replies: list[list[int]]


def package_folder() -> Path:
    """Where llama.cpp for Node.js lies, here or in a folder above; ValueError that says how to install it."""
    if shutil.which("node") is None:
        raise ValueError(f"checking a GGUF needs Node.js 20 or newer, and then: {INSTALL}")
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / PACKAGE).is_dir():
            return folder / PACKAGE
    raise ValueError(f"checking a GGUF needs llama.cpp, here or in a folder above: {INSTALL}")


def ask(
    model: Path,
    *,
    texts: Sequence[str] = (),
    texts_with_marks: Sequence[str] = (),
    scored: Sequence[Ids] = (),
    prompts: Sequence[Ids] = (),
    count: int = 0,
    threads: int = 2,
) -> Answer:
    """Let llama.cpp tokenize texts (marks read as text, or as marks), score ids and continue prompts greedily.

    `scored` gives one Score for each position that has a next one, `prompts` gives `count` ids each.
    """
    question = {
        "model": str(model.resolve()),
        "threads": threads,
        "texts": list(texts),
        "texts_with_marks": list(texts_with_marks),
        "scored": [list(ids) for ids in scored],
        "prompts": [list(ids) for ids in prompts],
        "count": count,
    }
    command = ["node", str(SCRIPT), str(package_folder())]
    done = subprocess.run(command, input=json.dumps(question).encode(), capture_output=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise RuntimeError(f"llama.cpp could not read {model}: {' | '.join(lines[-5:])}")
    found = json.loads(done.stdout)
    scores = [[Score(*score) for score in of_text] for of_text in found["scores"]]
    return Answer(found["ids"], found["ids_with_marks"], scores, found["replies"])
