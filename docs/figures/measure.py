"""Measure what the pictures of the docs show, in a real model and its runs:

    python docs/figures/measure.py --base BUNDLE --data FOLDER    what a base model does while it reads held-out text
    python docs/figures/measure.py --run RUN                      the experts of a pretraining run, step by step
    python docs/figures/measure.py --grpo RUN                     what reinforcement learning did, step by step

Together or one by one. Writes docs/figures/measured/*.json, with model, commit and machine; draw.py draws from these,
so that nobody needs the weights. FOLDER: the token files that the model was trained on; their validation split is read.
A run keeps its last checkpoints only, and the router's bias is read from those (--train.keep_last keeps more).
"""

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from safetensors import safe_open  # noqa: E402

from docs.figures import probes  # noqa: E402
from nanollm.bundle import Bundle, load_bundle  # noqa: E402
from nanollm.data.batches import sequential_batches  # noqa: E402
from nanollm.data.shards import Shards  # noqa: E402
from nanollm.model.cache import LatentCache  # noqa: E402
from nanollm.model.config import ModelConfig  # noqa: E402
from nanollm.origin import commit, hardware  # noqa: E402
from nanollm.settings import load_preset, preset_names, read_mapping  # noqa: E402
from nanollm.sources.gsm8k import extract_answer  # noqa: E402
from nanollm.train.metrics import read_metrics  # noqa: E402

MEASURED = HERE / "measured"
WINDOWS, WINDOWS_AT_ONCE = 32, 4
DOCUMENTS, DOCUMENT_TOKENS, DOCUMENTS_AT_ONCE = 24, 256, 6
SENTENCE = "Anna has a red book and Tom has a blue pen. Tom gave Anna the blue"
GRPO_SHOWN = ("reward", "reply_tokens", "entropy", "groups", "groups_dropped")
VALIDATED = ("val_accuracy", "val_accuracy_low", "val_accuracy_high")

Facts = dict[str, Any]


def main(words: Sequence[str]) -> int:
    """Exit status: 0 written, 2 what was asked for cannot be measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, metavar="BUNDLE", help="of a base model")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="token files with a validation split, for --base")
    parser.add_argument("--run", type=Path, help="folder of a pretraining run")
    parser.add_argument("--grpo", type=Path, metavar="RUN", help="folder of a run of nanollm grpo")
    parser.add_argument("--out", type=Path, default=MEASURED, help="where the files go")
    o = parser.parse_args(words)
    try:
        if not (o.base or o.run or o.grpo):
            raise ValueError("nothing to measure: give --base BUNDLE --data FOLDER, --run RUN or --grpo RUN")
        if o.base and not o.data:
            raise ValueError("--base needs --data FOLDER, the token files that the model was trained on")
        for name, facts in measured(o):
            write(o.out / f"{name}.json", facts)
            print(o.out / f"{name}.json")
    except (OSError, ValueError) as problem:
        print(problem, file=sys.stderr)
        return 2
    return 0


def measured(o: argparse.Namespace) -> Iterator[tuple[str, Facts]]:
    """The name of each file, and what goes into it."""
    if o.base:
        bundle = load_bundle(o.base)
        shards = Shards.open(o.data, "val", tokenizer_fingerprint=bundle.tokenizer.fingerprint)
        about = of_model(bundle.model.config, bundle.provenance.get("tokens_seen"))
        yield "residual", about | residual(bundle, shards)
        yield "attention", about | attention(bundle, shards)
        yield "experts", about | experts(bundle, shards)
    if o.run:
        yield "training", training(o.run)
    if o.grpo:
        yield "grpo", grpo(o.grpo)


# --- one model ---


def of_model(c: ModelConfig, tokens_seen: int | None) -> Facts:
    """What stands at the head of each file."""
    names = [name for name in preset_names("model") if ModelConfig(**load_preset("model", name)) == c]
    machine = hardware()
    device = machine["gpu"] or f"{machine['cores']} cores of an {machine['processor']}"
    return {
        "model": names[0] if names else f"a model of {c.total_parameters:,} parameters",
        "parameters": c.total_parameters,
        "tokens_seen": tokens_seen,
        "commit": commit() or "unknown",
        "machine": f"{device}, torch {torch.__version__}",
    }


def windows(bundle: Bundle, shards: Shards) -> list[Any]:
    """Windows of the model's context, spread evenly over the held-out text."""
    return list(sequential_batches(shards, bundle.model.config.context_length, WINDOWS_AT_ONCE, WINDOWS))


def residual(bundle: Bundle, shards: Shards) -> Facts:
    """docs/concepts/architecture.md"""
    batches = windows(bundle, shards)
    blocks = ["experts" if bundle.model.config.is_moe(i) else "dense" for i in range(bundle.model.config.n_blocks)]
    found = probes.streams(bundle.model, batches, torch.from_numpy(bundle.tokenizer.token_bytes).long())
    return {"tokens": sum(batch.count for batch in batches), "blocks": blocks} | found


def attention(bundle: Bundle, shards: Shards) -> Facts:
    """docs/concepts/attention.md"""
    documents = beginnings(shards)
    found = probes.heads(bundle.model, documents.split(DOCUMENTS_AT_ONCE))
    ids = [bundle.tokenizer.bos_id, *bundle.tokenizer.encode(SENTENCE)]
    by_block = probes.weights_of(bundle.model, torch.tensor([ids]))
    shown = {}
    for habit in ("first", "before", "itself", "repeat"):
        share, block, head = max((s, b, h) for b, row in enumerate(found[habit]) for h, s in enumerate(row))
        matrix = by_block[block][0, head].tolist()
        percent = [[round(100 * weight) for weight in row[: i + 1]] for i, row in enumerate(matrix)]
        shown[habit] = {"block": block + 1, "head": head + 1, "share": share, "percent": percent}
    texts = ["<s>", *(bundle.tokenizer.bytes_of(token).decode(errors="replace") for token in ids[1:])]
    return {
        "documents": len(documents),
        "document_tokens": DOCUMENT_TOKENS,
        "cache_bytes_per_token": cache_bytes(bundle.model.config),
        "heads": found,
        "sentence": {"tokens": texts, "shown": shown},
    }


def beginnings(shards: Shards) -> torch.Tensor:
    """The first tokens of documents that are long enough, spread over the split: (documents, tokens)."""
    starts = [*shards.document_offsets().tolist(), shards.tokens_total]
    long = [a for a, b in pairwise(starts) if b - a >= DOCUMENT_TOKENS]
    if not long:
        raise ValueError(f"{shards.folder} has no held-out document of {DOCUMENT_TOKENS} tokens; prepare longer ones")
    taken = [long[number * len(long) // min(DOCUMENTS, len(long))] for number in range(min(DOCUMENTS, len(long)))]
    return torch.stack([torch.from_numpy(shards.read(start, DOCUMENT_TOKENS).astype("int64")) for start in taken])


def cache_bytes(c: ModelConfig, length: int = 128) -> float:
    """What a cache of the engine takes per token, in bfloat16."""
    return LatentCache.empty(c, rows=1, length=length, dtype=torch.bfloat16).slots.nbytes / length


def experts(bundle: Bundle, shards: Shards) -> Facts:
    """docs/concepts/experts.md"""
    c, batches = bundle.model.config, windows(bundle, shards)
    found = probes.Routing(bundle.model, bundle.tokenizer).read(bundle.model, batches).facts()
    blocks = [block + 1 for block in range(c.n_blocks) if c.is_moe(block)]
    return {"read": sum(batch.tokens.numel() for batch in batches), "blocks": blocks} | found


# --- runs ---


def training(run: Path) -> Facts:
    """docs/concepts/experts.md: load of each expert over the steps, and the router's bias in the checkpoints left."""
    settings = read_mapping(run / "config.yaml")
    c = ModelConfig(**settings["model"])
    lines = [line for line in read_metrics(run) if "expert_load" in line]
    tokens = settings["train"]["batch_size"] * c.context_length
    return of_model(c, lines[-1]["step"] * tokens) | {
        "blocks": [block + 1 for block in range(c.n_blocks) if c.is_moe(block)],
        "balance_rate": settings["optim"]["balance_rate"],
        "tokens_per_step": tokens,
        "steps": [line["step"] for line in lines],
        "load": [line["expert_load"] for line in lines],
        "bias": {str(step): bias for step, bias in biases(run)},
    }


def biases(run: Path) -> Iterator[tuple[int, list[list[float]]]]:
    """Step and the bias of every expert, by Mixture of Experts, of each checkpoint."""
    for file in sorted(run.glob("checkpoints/step-*/*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            names = [name for name in tensors.keys() if name.endswith("balance_bias")]  # noqa: SIM118 (no dict)
            names.sort(key=lambda name: int(re.findall(r"\d+", name)[0]))
            if names:
                yield int(file.parent.name[5:]), [tensors.get_tensor(name).tolist() for name in names]


def grpo(run: Path) -> Facts:
    """docs/concepts/grpo.md"""
    settings, lines = read_mapping(run / "config.yaml"), read_metrics(run)
    bundle = load_bundle(run / "bundle")
    steps = [line for line in lines if "reward" in line]
    checks = [line for line in lines if VALIDATED[0] in line]
    return of_model(bundle.model.config, None) | {
        "task": settings["task"],
        "rollout": settings["rollout"],
        "validation_problems": settings["validation_problems"],
        "steps": [line["step"] for line in steps],
        **{name: [line.get(name) for line in steps] for name in GRPO_SHOWN},
        "checks": [{"step": line["step"]} | {name: line[name] for name in VALIDATED} for line in checks],
        "evaluations": list(evaluations(run)),
        "group": telling_group(run),
    }


def telling_group(run: Path) -> Facts:
    """A group of the first steps whose replies differ most, with both good ones and bad ones among them."""
    size, found = read_mapping(run / "config.yaml")["rollout"]["group_size"], []
    for file in sorted(run.glob("rollouts/step-*.jsonl"))[:5]:
        records = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
        for first in range(0, len(records), size):
            group = records[first : first + size]
            good = sum(record["advantage"] > 0 for record in group)
            is_even = min(good, size - good) >= size // 4
            length = sum(len(record["reply"]) for record in group)
            found.append((-is_even, -len({record["reply"] for record in group}), length, int(file.stem[5:]), group))
    if not found:
        raise ValueError(f"{run / 'rollouts'} has no replies; is it the folder of a run of nanollm grpo?")
    *_, step, group = min(found, key=lambda each: each[:4])
    kept = ("reply", "reward", "advantage", "tokens")
    replies = [{name: record[name] for name in kept} for record in group]
    answer = extract_answer(group[0]["answer"]) or group[0]["answer"]
    return {"step": step, "question": group[0]["question"], "answer": answer, "replies": replies}


def evaluations(run: Path) -> Iterator[Facts]:
    """Greedy scores of the run's bundle and of the one it began with, where `nanollm eval --against` compared them."""
    for file in sorted(run.glob("eval/*/eval.json"), reverse=True):
        figures = json.loads(file.read_text("utf-8"))
        if "against" not in figures:
            continue
        grader = next(iter(figures["difference"]))  # strict; correct, for a task of one's own
        yield {
            "split": figures["settings"]["task"]["split"],
            "before": figures["against"]["greedy"]["scores"][grader],
            "after": figures["bundle"]["greedy"]["scores"][grader],
            "difference": figures["difference"][grader],
        }


# --- files ---


def write(path: Path, facts: Mapping[str, Any]) -> None:
    """JSON with one name per line, numbers to four digits: it is read by people and kept under version control."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"  {json.dumps(name)}: {json.dumps(rounded(value), ensure_ascii=False)}" for name, value in facts.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8", newline="\n")


def rounded(value: Any) -> Any:
    """Every number that is not whole to four digits."""
    match value:
        case float():
            return float(f"{value:.4g}")
        case Mapping():
            return {name: rounded(each) for name, each in value.items()}
        case list() | tuple():
            return [rounded(each) for each in value]
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
