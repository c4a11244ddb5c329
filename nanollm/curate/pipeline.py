"""The steps of a curation: what datatrove runs, where its files lie, and how they become one prepared folder.

1. filter: read, drop what the filters drop, keep the rest on disk, and note its MinHash signatures;
2. buckets, clusters: find near duplicates;
3. shards: drop them, and what holds a question of an evaluation; tokenise. Each task prepares one part (data/merge.py);
4. the end: count what was removed, list the clusters, and merge the parts.
"""

import hashlib
import importlib.util
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datatrove.pipeline.dedup import (
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.filters.gopher_quality_filter import GopherQualityFilter
from datatrove.pipeline.filters.gopher_repetition_filter import GopherRepetitionFilter
from datatrove.utils.hashing import HashConfig

from nanollm import __version__, durable
from nanollm.curate.blocks import (
    Lists,
    count_lists,
    keep,
    name_clusters,
    read_kept,
    read_list,
    read_share,
    write_shards,
)
from nanollm.curate.config import FASTTEXT_MODEL, Config, EvalsConfig, FilterConfig
from nanollm.curate.executors import PipelineStage
from nanollm.curate.filters import C4Quality, DropContaminated, InLanguage, RegexWords
from nanollm.data.merge import is_merged, merge, missing
from nanollm.data.prepare import header_of, refuse_other
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
LATE = ("duplicates", "contaminated")  # removed from what the filters kept
C4_LINES = "c4_lines"  # lines of documents that stayed


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
        """What was removed, and until the end what the steps hand to each other: kept, minhash, bad and clusters."""
        return self.config.save_dir / "curation"

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
        elif strangers := sorted([*save_dir.glob("*.npy"), *save_dir.glob("part-*"), *save_dir.glob("prog*")]):
            raise ValueError(f"{strangers[0]} is not of curate; give an empty or a new folder as --save_dir")
        durable.write_json(self.folder / "questions.json", self.questions)
        durable.write_json(settings, self.header)

    def stages(self) -> list[PipelineStage]:
        """What datatrove runs, one after the other."""
        c, minhash = self.config, self.folder / "minhash"
        bad_folder, kept = self.folder / "bad", self.folder / "kept"
        signatures, pairs, remove = (minhash / name for name in ("signatures", "pairs", "remove"))
        read = partial(read_share, files=self.files, column=c.text_column, bad_folder=bad_folder)
        first: list[Any] = [read, *self.filters(), partial(keep, folder=kept)]
        last: list[Any] = [partial(read_kept, folder=kept)]
        if c.dedup:
            first.append(MinhashDedupSignature(str(signatures), MINHASH, RegexWords()))
            last.append(partial(name_clusters, remove=remove, folder=self.folder / "clusters"))
            last.append(MinhashDedupFilter(str(remove), self.removed("duplicates")))
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
        between = [
            PipelineStage(
                "buckets", MINHASH.num_buckets, [MinhashDedupBuckets(str(signatures), str(pairs), config=MINHASH)]
            ),
            PipelineStage("clusters", 1, [MinhashDedupCluster(str(pairs), str(remove), MINHASH, save_cluster_id=True)]),
        ]
        return [
            PipelineStage("filter", c.tasks, first),
            *(between if c.dedup else []),
            PipelineStage("shards", c.tasks, last),
        ]

    def filters(self) -> Iterator[Any]:
        """Those that are switched on, the quick ones first."""
        c, words = self.config.filters, RegexWords()
        if c.language and c.language_model:
            yield InLanguage(c.language, c.language_model, self.removed("language"))
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
        if c.c4:
            yield C4Quality(words, self.removed("c4"), self.removed(C4_LINES))

    def removed(self, name: str) -> Lists:
        return Lists(self.folder / "removed" / name)

    def finish(self) -> None:
        """Count what was removed, list the clusters, and merge the parts."""
        c = self.config
        if is_merged(c.save_dir):
            return
        if others := missing(c.save_dir, c.tasks):
            raise ValueError(f"part {others[0]} of {c.save_dir} is missing; run the same command again")
        clusters = self.clusters()
        figures = self.figures(clusters)
        if not figures["documents"]["kept"]:
            raise ValueError(
                f"nothing to train on: {in_words(figures)}; {self.bad_in_words()}; lists are in {self.folder}. "
                f"Loosen the filters or give other text, with another --save_dir"
            )
        lines = "".join(f"{json.dumps(cluster, ensure_ascii=False)}\n" for cluster in clusters)
        durable.write_file(self.folder / "clusters.jsonl", lines.encode())
        made_by = f"nanollm {__version__} curate, datatrove {version('datatrove')}"
        durable.write_json(c.save_dir / "curation.json", figures | {"settings": self.header, "made_by": made_by})
        merge(c.save_dir, c.tasks, self.header, {"curation": figures})

    def clean_up(self) -> None:
        """Remove what only the way here needed."""
        for name in ("kept", "minhash", "bad", "clusters"):
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def figures(self, clusters: list[dict[str, Any]]) -> dict[str, Any]:
        """Documents read and kept, those removed by filter and reason, and clusters of duplicates by size."""
        removed = {folder.name: count_lists(folder) for folder in sorted(self.folder.glob("removed/*"))}
        lines = removed.pop(C4_LINES, Counter()).total()
        passed = count_lists(self.folder / "kept").total()
        late = sum(removed.get(name, Counter()).total() for name in LATE)
        early = sum(count.total() for count in removed.values()) - late
        sizes = Counter(1 + len(cluster["removed"]) for cluster in clusters)
        return {
            "documents": {"read": passed + early, "kept": passed - late},
            "removed": {name: dict(sorted(count.items())) for name, count in removed.items()},
            "documents_that_lost_lines": lines,
            "clusters_by_size": {str(size): sizes[size] for size in sorted(sizes)},
        }

    def clusters(self) -> list[dict[str, Any]]:
        """Each cluster of duplicates: which document was kept, and which were removed for it."""
        found: dict[int, dict[str, Any]] = {}
        for file in sorted(self.folder.glob("clusters/*.jsonl.gz")):
            for record in read_list(file):
                cluster = found.setdefault(record["cluster"], {"cluster": record["cluster"], "kept": "", "removed": []})
                if record["is_kept"]:
                    cluster["kept"] = record["id"]
                else:
                    cluster["removed"].append(record["id"])
        return [found[number] for number in sorted(found)]

    def bad_in_words(self) -> str:
        """How many records of the source could not be read, and why the first could not."""
        files = sorted(self.folder.glob("bad/*.json"))
        bad = [BadRecord(**record) for file in files for record in json.loads(file.read_bytes())]
        return f"{len(bad):,} bad records" + (f", the first: {bad[0]}" if bad else "")


def in_words(figures: dict[str, Any]) -> str:
    gone = [f"{name} {sum(counts.values()):,}" for name, counts in figures["removed"].items()]
    kept, read = figures["documents"]["kept"], figures["documents"]["read"]
    return f"{kept:,} of {read:,} documents kept; removed by {', '.join(gone) or 'nothing'}"


def questions_of(c: EvalsConfig) -> list[dict[str, str]]:
    """The questions that no document may hold, and where they are from: file and number, from 1."""
    bad: list[BadRecord] = []
    found: list[tuple[str, list[str]]] = []
    if c.input:
        for file in find_files([Path(given) for given in c.input], "test"):
            found.append((file.name, list(read_texts([file], c.column, bad.append))))
    else:
        try:
            problems = [problem.question for problem in gsm8k.problems(None, "test", bad.append)]
        except (ValueError, OSError) as error:
            raise ValueError(f"{error}: --evals.input FILE ..., or --evals.enabled false") from error
        found.append((f"{gsm8k.NAME} test", problems))
    if bad:
        say(f"{len(bad):,} questions cannot be read and are not searched for, the first: {bad[0]}")
    questions = [
        {"where": f"{name}, {number:,}", "text": text}
        for name, texts in found
        for number, text in enumerate(texts, start=1)
    ]
    if not questions:
        raise ValueError(
            f"no question in {', '.join(c.input)}: name their column with --evals.column, now {c.column!r}, "
            f"or leave the search out with --evals.enabled false"
        )
    return questions


def filters_of(c: FilterConfig) -> dict[str, Any]:
    """The filters as the manifest describes them; of the language model its bytes count, not its place."""
    if c.language is None:
        return {key: value for key, value in asdict(c).items() if not key.startswith("language")}
    assert c.language_model is not None
    if importlib.util.find_spec("fasttext") is None:
        raise ValueError("filters.language needs fastText: pip install fasttext-numpy2-wheel")
    if not c.language_model.is_file():
        raise FileNotFoundError(f"{c.language_model} does not exist; fastText's model is at {FASTTEXT_MODEL} (126 MB)")
    return asdict(c) | {"language_model": durable.sha256_of(c.language_model)}
