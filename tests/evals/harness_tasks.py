"""Three small tasks of lm-evaluation-harness, written as a user writes his own: YAML and JSON lines in a folder."""

import json
from pathlib import Path

import yaml

from tests.conftest import STORY

SENTENCES = [each.strip() for each in STORY.read_text("utf-8").split(".") if 7 < len(each.split()) < 20]
TEXTS = [STORY.read_text("utf-8")[start : start + size] for start, size in ((0, 90), (300, 1500), (900, 700))]

CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{query}}",
    "doc_to_target": "{{gold}}",
    "doc_to_choice": "{{choices}}",
    "fewshot_split": "validation",
    "metric_list": [
        {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
    ],
}
REPLY = {
    "output_type": "generate_until",
    "doc_to_text": "{{query}}",
    "doc_to_target": "{{choices[0]}}",
    "generation_kwargs": {"until": ["\n\n", "e"], "do_sample": False, "max_gen_toks": 24},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
WHOLE = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": metric} for metric in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
}


def write_tasks(folder: Path) -> Path:
    """nano_choice, nano_reply and nano_whole."""
    questions = [question(number) for number in range(12)]
    write_task(folder, "nano_choice", CHOICE, questions)
    write_task(folder, "nano_reply", REPLY, questions[:6])
    write_task(folder, "nano_whole", WHOLE, [{"text": text} for text in TEXTS])
    return folder


def question(number: int) -> dict[str, object]:
    """Half a sentence, and four ways to go on: its own, those of others, and one word."""
    words = SENTENCES[number].split()
    others = [" ".join(SENTENCES[number - step].split()[-3:]) for step in (1, 2)]
    return {"query": " ".join(words[:5]), "choices": [" ".join(words[5:]), *others, "soup"], "gold": number % 4}


def write_task(folder: Path, name: str, settings: dict[str, object], documents: list[dict[str, object]]) -> None:
    lines = folder / f"{name}.jsonl"
    lines.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
    where = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"validation": str(lines)}}}
    whole = {"task": name, "validation_split": "validation", "metadata": {"version": 1.0}} | where | settings
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(whole), encoding="utf-8")
