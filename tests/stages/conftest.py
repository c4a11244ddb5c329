"""A prepared corpus of a few thousand tokens, the smallest sensible run on it, and what a run leaves."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nanollm.bundle import save_bundle
from nanollm.model.config import ModelConfig
from nanollm.model.transformer import Transformer
from nanollm.stages import preprocess
from nanollm.stages.pretrain import Config
from nanollm.text.tokenizer import Tokenizer
from nanollm.train.metrics import TIMED, read_metrics
from nanollm.train.optim import OptimConfig
from nanollm.train.run import TrainConfig
from tests.conftest import STORY

MODEL = ModelConfig(
    vocab_size=600,
    context_length=32,
    d_model=32,
    n_blocks=4,
    n_heads=2,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=16,
    d_ff=64,
    n_routed_experts=2,
    n_shared_experts=2,
    experts_per_token=1,
    d_expert=32,
    norm_topk_prob=False,
)


def untrained(folder: Path, shape: ModelConfig, tokenizer: Tokenizer, seed: int = 0) -> Path:
    """The bundle of a model that has learned nothing."""
    return save_bundle(folder, shape, Transformer(shape).init(seed).state_dict(), tokenizer, {"made_by": "a test"})


FILES_OF_A_RUN = {
    *("config.yaml", "inputs.json", "starts.jsonl", ".lock"),
    *("metrics.jsonl", "report.html", "checkpoints", "bundle"),
}


@contextmanager
def interrupted(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, *, after: int) -> Iterator[None]:
    """Ctrl-C at the call of a function that comes after so many others; the block must end with it."""
    right, calls = getattr(owner, name), []

    def stops(*given, **options):
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt
        return right(*given, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, name, stops)
        yield


def weights_of(run: Path) -> str:
    return hashlib.sha256((run / "bundle" / "model.safetensors").read_bytes()).hexdigest()


def told(run: Path) -> list[dict[str, object]]:
    """The metrics without those that tell the time."""
    return [{k: v for k, v in line.items() if k not in TIMED} for line in read_metrics(run)]


@pytest.fixture(scope="session")
def bundle(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learned nothing."""
    return untrained(tmp_path_factory.mktemp("untrained") / "bundle", MODEL, tokenizer)


@pytest.fixture(scope="session")
def tokenizer_path(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    tokenizer.save(path)
    return path


@pytest.fixture(scope="session")
def token_files(tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two hundred short documents of the story's words, split into train and val."""
    folder = tmp_path_factory.mktemp("corpus")
    words = STORY.read_text("utf-8").split()
    for number in range(200):
        text = " ".join(words[(7 * number + 3 * i) % len(words)] for i in range(40))
        (folder / f"{number:03}.txt").write_text(text, encoding="utf-8")
    config = preprocess.Config(
        kind="text", tokenizer_path=tokenizer_path, save_dir=folder / "tokens", input=[folder], val_fraction=0.1
    )
    return preprocess.run(config)


@pytest.fixture
def prepared(tokenizer_path: Path, tmp_path: Path):
    """prepared(kind, file, ..., **options of preprocess): a folder of token files; by default nothing is held out."""

    def make(kind: str, *files: Path, **options) -> Path:
        given = {"input": [*files], "val_fraction": 0.0, "save_dir": tmp_path / f"prepared {kind}"} | options
        return preprocess.run(preprocess.Config(kind=kind, tokenizer_path=tokenizer_path, **given))

    return make


@pytest.fixture
def run_config(token_files: Path, tokenizer_path: Path, tmp_path: Path):
    """run_config(out=..., steps=..., **fields of Config): a run of seconds in float32."""

    def make(steps: int = 12, out: str = "run", **fields) -> Config:
        train = TrainConfig(
            steps=steps, batch_size=4, micro_batch_size=2, log_every=1, validate_every=4, save_every=3, sample_every=0
        )
        defaults = {
            "model": MODEL,
            "tokenizer_path": tokenizer_path,
            "data": token_files,
            "out": tmp_path / out,
            "train": train,
            "optim": OptimConfig(warmup_steps=2),
            "dtype": "float32",
            "sample_prompts": ["Once"],
        }
        return Config(**defaults | fields)

    return make
