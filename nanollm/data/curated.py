"""What did a curation remove, and how much is left? From the lists that its tasks left behind (data/blocks.py)."""

import json
from collections import Counter
from typing import Any

from nanollm import durable
from nanollm.data.blocks import Workplace, count_lists, read_list
from nanollm.sources.files import BadRecord

LATE = ("duplicates", "contaminated")  # removed from what the filters kept
C4_LINES = "c4_lines"  # lines of documents that stayed


def figures_of(place: Workplace) -> dict[str, Any]:
    """Documents read and kept, those removed by filter and reason, and clusters of duplicates by size."""
    removed = {folder.name: count_lists(folder) for folder in sorted(place.removed.glob("*"))}
    lines = removed.pop(C4_LINES, Counter()).total()
    passed = count_lists(place.kept).total()
    late = sum(removed.get(name, Counter()).total() for name in LATE)
    early = sum(count.total() for count in removed.values()) - late
    sizes = Counter(1 + len(cluster["removed"]) for cluster in clusters_of(place))
    return {
        "documents": {"read": passed + early, "kept": passed - late},
        "removed": {name: dict(sorted(count.items())) for name, count in removed.items()},
        "documents_that_lost_lines": lines,
        "clusters_by_size": {str(size): sizes[size] for size in sorted(sizes)},
    }


def clusters_of(place: Workplace) -> list[dict[str, Any]]:
    """Each cluster of duplicates: which document was kept, and which were removed for it."""
    found: dict[int, dict[str, Any]] = {}
    for file in sorted(place.clusters.glob("*.jsonl.gz")):
        for record in read_list(file):
            cluster = found.setdefault(record["cluster"], {"cluster": record["cluster"], "kept": "", "removed": []})
            if record["is_kept"]:
                cluster["kept"] = record["id"]
            else:
                cluster["removed"].append(record["id"])
    return [found[number] for number in sorted(found)]


def list_clusters(place: Workplace) -> None:
    """Write clusters.jsonl, for people."""
    text = "".join(f"{json.dumps(cluster, ensure_ascii=False)}\n" for cluster in clusters_of(place))
    durable.write_file(place.folder / "clusters.jsonl", text.encode())


def bad_in_words(place: Workplace) -> str:
    """How many records of the source could not be read, and why the first could not."""
    bad = [BadRecord(**record) for file in sorted(place.bad.glob("*.json")) for record in json.loads(file.read_bytes())]
    return f"{len(bad):,} bad records" + (f", the first: {bad[0]}" if bad else "")


def lines(figures: dict[str, Any]) -> list[str]:
    """The figures in words."""
    gone = [f"{name} {sum(counts.values()):,}" for name, counts in figures["removed"].items()]
    kept, read = figures["documents"]["kept"], figures["documents"]["read"]
    return [f"{kept:,} of {read:,} documents kept; removed by {', '.join(gone) or 'nothing'}"]
