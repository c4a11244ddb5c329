"""A prepared corpus of a few thousand tokens and the smallest sensible run on it."""

from pathlib import Path

import pytest

from nanollm.bundle import save_bundle
from nanollm.model.config import ModelConfig
from nanollm.model.transformer import Transformer
from nanollm.stages import preprocess
from nanollm.stages.pretrain import Config
from nanollm.text.tokenizer import Tokenizer
from nanollm.train.optim import OptimConfig
from nanollm.train.run import TrainConfig

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


@pytest.fixture(scope="session")
def bundle(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learned nothing."""
    folder = tmp_path_factory.mktemp("untrained") / "bundle"
    weights = Transformer(MODEL).init(0).state_dict()
    return save_bundle(folder, MODEL, weights, tokenizer, {"made_by": "a test"})


@pytest.fixture(scope="session")
def tokenizer_path(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    tokenizer.save(path)
    return path


@pytest.fixture(scope="session")
def token_files(tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two hundred short documents of the story's words, split into train and val."""
    folder = tmp_path_factory.mktemp("corpus")
    words = (Path(__file__).parents[1] / "story.txt").read_text("utf-8").split()
    for number in range(200):
        text = " ".join(words[(7 * number + 3 * i) % len(words)] for i in range(40))
        (folder / f"{number:03}.txt").write_text(text, encoding="utf-8")
    config = preprocess.Config(
        kind="text", tokenizer_path=tokenizer_path, save_dir=folder / "tokens", input=[folder], val_fraction=0.1
    )
    return preprocess.run(config)


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
