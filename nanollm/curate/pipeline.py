"""The steps of a curation: what datatrove runs, where its files lie, and how they become one prepared folder.

1. filter: read, drop what the filters drop, keep the rest on disk, and note its MinHash signatures;
2. buckets, clusters: find near duplicates;
3. shards: drop them, and what holds a question of an evaluation; tokenise. Each task prepares one part;
4. the end: count what was removed, and merge the parts.
"""

import hashlib
import importlib.util
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import (
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.filters.c4_filters import C4QualityFilter
from datatrove.pipeline.filters.gopher_quality_filter import GopherQualityFilter
from datatrove.pipeline.filters.gopher_repetition_filter import GopherRepetitionFilter
from datatrove.pipeline.filters.language_filter import LanguageFilter
from datatrove.utils.hashing import HashConfig

from nanollm import __version__, durable
from nanollm.curate.blocks import RemovedWriter, keep, part_folder, read_bad, read_kept, read_share, write_shards
from nanollm.curate.config import Config, EvalsConfig, FilterConfig
from nanollm.curate.executors import PipelineStage
from nanollm.curate.filters import DropContaminated, RegexWords
from nanollm.data.prepare import BAD_RECORDS, header_of, refuse_other
from nanollm.data.shards import MANIFEST, SplitEntry, read_manifest, write_manifest
from nanollm.evals.contamination import NGRAM_WORDS
from nanollm.progress import say
from nanollm.sources import gsm8k
from nanollm.sources.files import BadRecord, File, find_files, read_texts
from nanollm.sources.remote import find_everywhere, size_of
from nanollm.text.tokenizer import Tokenizer

MAX_WORDS = 100_000
"""Most words of a document, for gopher_quality."""
MINHASH = MinhashConfig(
    n_grams=5,
    num_buckets=14,
    hashes_per_bucket=8,
    hash_config=HashConfig(hash_fc="sha1"),  # its other one takes no text from xxhash 4 on
)


@dataclass(frozen=True)
class Curation:
    """What is curated into what."""

    config: Config
    tokenizer: Tokenizer
    files: list[File]
    header: dict[str, Any]
    """Of the finished folder's manifest, and what decides all that is in it."""
    questions: list[dict[str, str]]

    @property
    def folder(self) -> Path:
        """What was removed, and until the end what the steps hand to each other: kept, minhash and bad."""
        return self.config.save_dir / "curation"

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    @property
    def is_done(self) -> bool:
        return (self.config.save_dir / MANIFEST).exists()

    @classmethod
    def open(cls, c: Config) -> "Curation":
        """Everything that can be found missing or wrong before the work begins."""
        tokenizer = Tokenizer.load(c.tokenizer_path)
        files = find_everywhere(c.input)
        questions = questions_of(c.evals) if c.evals.enabled else []
        sha256 = hashlib.sha256(json.dumps(questions).encode()).hexdigest()
        source: dict[str, Any] = {"files": [[file.name, size_of(file)] for file in files], "column": c.text_column}
        source |= {"tasks": c.tasks, "filters": filters_of(c.filters), "dedup": c.dedup}
        source["evals"] = {"ngram": NGRAM_WORDS, "questions": len(questions), "sha256": sha256}
        header = header_of(tokenizer, c.prepare, source)
        return cls(c, tokenizer, files, json.loads(json.dumps(header)), questions)

    def begin(self) -> None:
        """Refuse a folder that was begun otherwise, and write down what this curation is."""
        settings, save_dir = self.folder / "settings.json", self.config.save_dir
        if settings.exists():
            refuse_other(save_dir, durable.read_json(settings), self.header)
        elif strangers := sorted([*save_dir.glob("*.npy"), *save_dir.glob("prog*")]):
            raise ValueError(f"{strangers[0]} is not of curate; give an empty or a new folder as --save_dir")
        durable.write_json(self.folder / "questions.json", self.questions)
        durable.write_json(settings, self.header)

    def stages(self) -> list[PipelineStage]:
        """What datatrove runs, one after the other."""
        c, minhash = self.config, self.folder / "minhash"
        bad_folder, kept = self.folder / "bad", self.folder / "kept"
        signatures, pairs, remove = (str(minhash / name) for name in ("signatures", "pairs", "remove"))
        read = partial(read_share, files=self.files, column=c.text_column, bad_folder=bad_folder)
        first: list[Any] = [read, *self.filters(), partial(keep, folder=kept)]
        last: list[Any] = [partial(read_kept, folder=kept)]
        between: list[PipelineStage] = []
        if c.dedup:
            first.append(MinhashDedupSignature(signatures, MINHASH, RegexWords()))
            find = MinhashDedupBuckets(signatures, pairs, config=MINHASH)
            between.append(PipelineStage("buckets", MINHASH.num_buckets, [find]))
            between.append(PipelineStage("clusters", 1, [MinhashDedupCluster(pairs, remove, MINHASH)]))
            last.append(MinhashDedupFilter(remove, self.removed("duplicates")))
        if c.evals.enabled:
            last.append(DropContaminated(self.folder / "questions.json", self.removed("contaminated")))
        last.append(
            partial(
                write_shards,
                save_dir=c.save_dir,
                tokenizer=self.tokenizer,
                config=c.prepare,
                source=self.header["source"],
                bad_folder=bad_folder,
            )
        )
        return [PipelineStage("filter", c.tasks, first), *between, PipelineStage("shards", c.tasks, last)]

    def filters(self) -> Iterator[Any]:
        """Those that are switched on, the quick ones first."""
        c, words = self.config.filters, RegexWords()
        if c.language:
            yield LanguageFilter(c.language, exclusion_writer=self.removed("language"))
        if c.gopher_repetition:
            yield GopherRepetitionFilter(exclusion_writer=self.removed("gopher_repetition"), language=words)
        if c.gopher_quality:
            yield GopherQualityFilter(
                c.min_words,
                MAX_WORDS,
                max_non_alpha_words_ratio=c.min_letters,  # which is what it does with it
                exclusion_writer=self.removed("gopher_quality"),
                language=words,
            )
        if c.c4:  # as FineWeb takes its rules: a line may end without a mark
            yield C4QualityFilter(self.removed("c4"), filter_no_terminal_punct=False, language=words)

    def removed(self, name: str) -> RemovedWriter:
        return RemovedWriter(self.folder / "removed" / name)

    def finish(self) -> None:
        """Count what was removed, merge the parts, and remove what only the way here needed."""
        c = self.config
        if not self.is_done:
            parts = [part_folder(c.save_dir, rank) for rank in range(c.tasks)]
            figures = self.figures(parts)
            if not figures["documents"]["kept"]:
                raise ValueError(
                    f"nothing to train on: {in_words(figures)}; {self.bad_in_words()}; lists are in {self.folder}. "
                    f"Loosen the filters or give other text, with another --save_dir"
                )
            made_by = f"nanollm {__version__} curate, datatrove {version('datatrove')}"
            merge(c.save_dir, parts, self.header | {"curation": figures, "made_by": made_by})
        for left in [*(self.folder / name for name in ("kept", "minhash", "bad")), *c.save_dir.glob("part-*")]:
            shutil.rmtree(left, ignore_errors=True)

    def figures(self, parts: Sequence[Path]) -> dict[str, Any]:
        """Documents read and kept, and those removed by filter and reason, as datatrove has counted them."""
        removed: dict[str, Counter[str]] = {}
        for stage in self.stages():
            steps = [block for block in stage.blocks if isinstance(block, PipelineStep)]
            for file in (self.logs / stage.name / "stats").glob("*.json"):
                for step, found in zip(steps, json.loads(file.read_bytes()), strict=True):
                    if writer := getattr(step, "exclusion_writer", None):
                        counts = removed.setdefault(writer.folder.name, Counter())
                        counts.update(dropped_by_reason(found["stats"], writer.folder.name))
        splits = [split for part in parts for split in read_manifest(part)[0]["splits"].values()]
        kept = sum(split["documents"] for split in splits)
        return {
            "documents": {"read": kept + sum(counts.total() for counts in removed.values()), "kept": kept},
            "removed": {name: dict(sorted(counts.items())) for name, counts in sorted(removed.items()) if counts},
        }

    def bad_in_words(self) -> str:
        """How many records of the source could not be read, and why the first could not."""
        bad = [record for file in sorted(self.folder.glob("bad/*.json")) for record in read_bad(file)]
        return f"{len(bad):,} bad records" + (f", the first: {bad[0]}" if bad else "")


def dropped_by_reason(stats: dict[str, Any], name: str) -> dict[str, int]:
    """What one task's filter dropped, by reason; by the filter's name where it gives none."""
    totals = {key: found["total"] if isinstance(found, dict) else found for key, found in stats.items()}
    reasons = {key.removeprefix("dropped_"): n for key, n in totals.items() if key.startswith("dropped_")}
    return reasons or ({name: totals["dropped"]} if "dropped" in totals else {})


def merge(folder: Path, parts: Sequence[Path], manifest: dict[str, Any]) -> None:
    """Move the files of prepared parts up into one folder, under consecutive numbers, and then write its manifest.

    Until that manifest is there the parts hold the plan (their own manifests), and a file is either at its old place or
    at its new one: killed anywhere and called again, it ends the same.
    """
    splits: dict[str, SplitEntry] = {}
    bad_records = b""
    for part in parts:
        for name, entry in read_manifest(part)[0]["splits"].items():
            whole = splits.setdefault(name, SplitEntry(tokens=0, documents=0, text_bytes=0, shards=[]))
            for total in ("tokens", "documents", "text_bytes"):
                whole[total] += entry[total]
            for shard in entry["shards"]:
                number = f"{len(whole['shards']):05d}"
                files = {re.sub(r"\d{5}", number, old, count=1): file for old, file in shard["files"].items()}
                for old, new in zip(shard["files"], files, strict=True):
                    if (part / old).exists():
                        (part / old).replace(folder / new)
                whole["shards"].append(shard | {"files": files})
        if (part / BAD_RECORDS).exists():
            bad_records += (part / BAD_RECORDS).read_bytes()
    if bad_records:
        durable.write_file(folder / BAD_RECORDS, bad_records)
    durable.sync(folder)
    counts = {"parts": len(parts), "bad_records": bad_records.count(b"\n"), "splits": splits}
    write_manifest(folder, manifest | counts)


def in_words(figures: dict[str, Any]) -> str:
    gone = [f"{name} {sum(counts.values()):,}" for name, counts in figures["removed"].items()]
    kept, read = figures["documents"]["kept"], figures["documents"]["read"]
    return f"{kept:,} of {read:,} documents kept; removed by {', '.join(gone) or 'nothing'}"


def questions_of(c: EvalsConfig) -> list[dict[str, str]]:
    """The questions that no document may hold, and where they are from: file and number, from 1."""
    bad: list[BadRecord] = []
    found: dict[str, list[str]] = {}
    if c.input:
        for file in find_files([Path(given) for given in c.input], "test"):
            found.setdefault(file.name, []).extend(read_texts([file], c.column, bad.append))
    else:
        try:
            found[f"{gsm8k.NAME} test"] = [each.question for each in gsm8k.problems(None, "test", bad.append)]
        except (ValueError, OSError) as error:
            raise ValueError(f"{error}: --evals.input FILE ..., or --evals.enabled false") from error
    if bad:
        say(f"{len(bad):,} questions cannot be read and are not searched for, the first: {bad[0]}")
    questions = [
        {"where": f"{name}, {number:,}", "text": text}
        for name, texts in found.items()
        for number, text in enumerate(texts, start=1)
    ]
    if not questions:
        raise ValueError(
            f"no question in {', '.join(c.input)}: name their column with --evals.column, now {c.column!r}, "
            f"or leave the search out with --evals.enabled false"
        )
    return questions


def filters_of(c: FilterConfig) -> dict[str, Any]:
    """The filters as the manifest describes them."""
    if c.language and importlib.util.find_spec("fasttext") is None:
        raise ValueError("filters.language needs fastText: pip install fasttext-numpy2-wheel fasteners")
    return {name: value for name, value in asdict(c).items() if value is not None}
