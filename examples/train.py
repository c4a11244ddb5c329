"""Train a small base model: the verbs tokenizer, preprocess and pretrain, called from Python.

  command   python examples/train.py --out runs/example
  hardware  two CPU cores
  time      about half a minute
  then      python examples/generate.py runs/example/pretrain/bundle

Your own text: --text my_texts/ (.txt, .jsonl, .csv, .parquet). Every verb is a Config, which refuses invalid values,
and run(Config), which returns the path of its result and skips finished work.
"""

import argparse
import json
from itertools import islice
from pathlib import Path

from nanollm import ModelConfig
from nanollm.config import load_preset
from nanollm.sources import builtin
from nanollm.stages import preprocess, pretrain, tokenizer
from nanollm.train.optim import OptimConfig
from nanollm.train.run import TrainConfig


def main(text: Path | None, out: Path, steps: int) -> Path:
    text = text or write_texts(out / "texts.jsonl")
    model = ModelConfig(**load_preset("model", "nano-1m"))
    learn = tokenizer.Config(corpus=[str(text)], output_dir=out / "tokenizer", vocab_size=model.vocab_size)
    tokens = preprocess.Config(kind="text", input=[text], tokenizer_path=learn.model_path, save_dir=out / "tokens")
    training = pretrain.Config(
        model=model,
        tokenizer_path=learn.model_path,
        data=tokens.save_dir,
        out=out / "pretrain",
        train=TrainConfig(steps=steps, batch_size=8, micro_batch_size=8, validate_every=50),
        optim=OptimConfig(lr=1.5e-2, warmup_steps=steps // 20, balance_rate=0.01),
        sample_prompts=["The function", "Return the"],
    )
    tokenizer.run(learn)
    preprocess.run(tokens)
    return pretrain.run(training)


def write_texts(path: Path, count: int = 400) -> Path:
    """Documentation from this machine, one text per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": text}) + "\n" for text in islice(builtin.documents(), count)]
    path.write_text("".join(lines), encoding="utf-8")
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a small base model.")
    parser.add_argument("--text", type=Path, help="a file or folder; default: documentation from this machine")
    parser.add_argument("--out", type=Path, default=Path("runs/example"))
    parser.add_argument("--steps", type=int, default=150)
    print(main(**vars(parser.parse_args())))
