"""Six jobs of a second, each as its user starts it, and what they leave behind."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from nanollm.stages import preprocess
from nanollm.text.tokenizer import Tokenizer
from nanollm.train.metrics import TIMED, read_metrics
from tests.conftest import STORY
from tests.faults.processes import Nursery, nursery
from tests.stages.conftest import MODEL, untrained

SAVE_EVERY = {"preprocess": 1500, "pretrain": 3, "sft": 3, "grpo": 2, "prefer": 3, "distill": 2}
"""Steps; tokens for preprocess."""


@dataclass(frozen=True)
class Job:
    """A command, and the folder that it fills."""

    verb: str
    words: list[str]
    out: Path

    @property
    def is_training(self) -> bool:
        return self.verb != "preprocess"

    def outcome(self) -> dict[str, object]:
        """All that it made, but for what tells the time: sha256 of files, and the lines of the metrics."""
        names = ("*",) if not self.is_training else ("bundle/*.safetensors", "checkpoints/*/*", "rollouts/*")
        files = sorted(path for name in names for path in self.out.glob(name) if path.name != ".lock")
        made: dict[str, object] = {
            str(path.relative_to(self.out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
        }
        if self.is_training:
            lines = read_metrics(self.out)
            made["metrics"] = [{key: line[key] for key in line if key not in TIMED} for line in lines]
        return made

    def remove(self) -> None:
        shutil.rmtree(self.out, ignore_errors=True)

    def leftovers(self) -> list[str]:
        """Drafts and what was moved aside."""
        return [path.name for path in self.out.rglob("*") if path.suffix in (".tmp", ".old", ".probe")]

    def __str__(self) -> str:
        return self.verb


@pytest.fixture(scope="session")
def children(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    """Starts the processes that are killed."""
    if shutil.which("cc") is None or not Path("/proc/self/fd").exists():
        pytest.skip("needs Linux and a C compiler: apt-get install gcc")
    with nursery(tmp_path_factory.mktemp("nursery")) as started:
        yield started


@pytest.fixture(scope="session")
def materials(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the jobs read: a tokenizer, text, token files of both kinds, and a model that has learned nothing."""
    home = tmp_path_factory.mktemp("materials")
    tokenizer.save(home / "tokenizer.model")
    words = STORY.read_text(encoding="utf-8").split()
    texts = [" ".join(words[(7 * n + 3 * i) % len(words)] for i in range(20 + n % 40)) for n in range(240)]
    lines = [json.dumps({"text": text}) for text in texts]
    lines[50], lines[200] = "{", '{"text": 5}'
    (home / "texts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    talks = [
        [{"role": "user", "content": f"What comes after {n}?"}, {"role": "assistant", "content": f"{n + 1}."}]
        for n in range(80)
    ]
    (home / "chats.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    pairs = [{"prompt": f"What comes after {n}?", "chosen": f"{n + 1}.", "rejected": f"{n}?"} for n in range(20)]
    (home / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    for kind, file in (("text", "texts"), ("chat", "chats")):
        preprocess.run(
            preprocess.Config(
                kind=kind,
                tokenizer_path=home / "tokenizer.model",
                save_dir=home / kind,
                input=[home / f"{file}.jsonl"],
                val_fraction=0.1,
            )
        )
    for name, seed in (("bundle", 0), ("teacher", 1)):
        untrained(home / name, dataclasses.replace(MODEL, context_length=192), tokenizer, seed=seed)
    (home / "model.yaml").write_text(json.dumps(dataclasses.asdict(MODEL)))  # JSON is YAML
    return {path.name.partition(".")[0]: path for path in home.iterdir()}


@pytest.fixture
def job_of(materials: dict[str, Path], tmp_path: Path):
    """job_of(verb): the job in a folder of this test's own."""

    def make(verb: str, *options: object) -> Job:
        out = tmp_path / "runs" / "one"
        out.parent.mkdir(exist_ok=True)
        steps = ["--train.steps", 3 * SAVE_EVERY[verb], "--train.save_every", SAVE_EVERY[verb], "--train.log_every", 1]
        training = [
            *(*steps, "--train.validate_every", 4, "--optim.warmup_steps", 2),
            *("--device", "cpu", "--dtype", "float32", "--out", out),
        ]
        batches = ["--train.batch_size", 4, "--train.micro_batch_size", 2, "--sample_prompts"]  # none
        words: dict[str, list[object]] = {
            "preprocess": [
                *("text", "--tokenizer_path", materials["tokenizer"], "--input", materials["texts"]),
                *("--save_dir", out, "--flush_every", SAVE_EVERY[verb], "--shard_tokens", 7000),
            ],
            "pretrain": [
                *("--model", materials["model"], "--tokenizer_path", materials["tokenizer"]),
                *("--data", materials["text"], "--validation_windows", 4, *training, *batches),
            ],
            "sft": [
                *("--bundle", materials["bundle"], "--data", materials["chat"]),
                *("--validation_conversations", 4, *training, *batches),
            ],
            "grpo": [
                *("--bundle", materials["bundle"], "--task.name", "tests.faults.even:Even", *training),
                *("--validation_problems", 4, "--train.micro_batch_size", 1),
                *("--rollout.prompts", 2, "--rollout.group_size", 4, "--rollout.max_tokens", 6),
                *("--optim.name", "adamw", "--optim.lr", 1e-3),
            ],
            "prefer": [
                *("--bundle", materials["bundle"], "--data", materials["pairs"], "--objective.loss", "kto", *training),
                *("--train.batch_size", 4, "--train.micro_batch_size", 1),
            ],
            "distill": [
                *("--bundle", materials["bundle"], "--teacher", materials["teacher"], *training),
                *("--task.name", "tests.faults.even:Even", "--validation_problems", 4, "--train.micro_batch_size", 1),
                *("--rollout.prompts", 2, "--rollout.group_size", 2, "--rollout.max_tokens", 6),
                *("--optim.name", "adamw", "--optim.lr", 1e-3),
            ],
        }
        return Job(verb, list(map(str, [verb, *words[verb], *options])), out)

    return make


@pytest.fixture(scope="session")
def left_alone() -> dict[tuple[str, ...], tuple[int, dict[str, object]]]:
    """By the words of a command: how often it changes its files, and what it makes, if nothing happens to it."""
    return {}
