"""Text of the web becomes token files that are worth training on, on one machine or on a cluster.

datatrove runs the steps (curate/pipeline.py), each in many tasks. What was removed is listed in curation/ beside the
token files, and counted in their manifest.
"""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from nanollm import durable
from nanollm.curate.config import Config
from nanollm.curate.executors import PipelineStage, run_here, submit
from nanollm.data.prepare import refuse_other
from nanollm.data.shards import read_manifest
from nanollm.extras import require
from nanollm.progress import say
from nanollm.sources.remote import size_of
from nanollm.stages.preprocess import summary

if TYPE_CHECKING:
    from nanollm.curate.pipeline import Curation


def plan(c: Config) -> str:
    """What would be done."""
    curation = open_curation(c)
    size = sum(map(size_of, curation.files))
    questions = f", {len(curation.questions):,} questions to be left out" if c.evals.enabled else ""
    tasks = ", ".join(f"{stage.name} ({stage.tasks} tasks)" for stage in curation.stages())
    return f"{len(curation.files):,} files of {size:,} bytes{questions}; {tasks}; by {c.executor}, into {c.save_dir}"


def run(c: Config) -> Path | None:
    """Curate the folder, or go on, and say what is in it; None: Slurm has it now."""
    curation = open_curation(c)
    from nanollm.curate.pipeline import in_words  # late: it needs datatrove

    durable.check_writable(c.save_dir, "--save_dir")
    with durable.lock_folder(curation.folder):
        if curation.is_done:
            refuse_other(c.save_dir, read_manifest(c.save_dir)[0], curation.header)
            say(f"{c.save_dir} is already prepared with these settings; nothing to do")
        else:
            curation.begin()
            if c.executor == "slurm":
                last = submit([*curation.stages(), PipelineStage("end", 1, [partial(end, curation)])], c, curation.logs)
                say(
                    f"Slurm has the jobs, the last is {last}; logs in {curation.logs}. After it, the same command says "
                    f"what is in {c.save_dir}, or submits what failed"
                )
                return None
            run_here(curation.stages(), c, curation.logs)
        curation.finish()
    manifest = read_manifest(c.save_dir)[0]
    for line in [in_words(manifest["curation"]), *summary(manifest, c.save_dir)]:
        say(line)
    say(f"what was removed is listed in {curation.folder}")
    return c.save_dir


def open_curation(c: Config) -> "Curation":
    require("curate", ("datatrove", "regex", "tokenizers"), "data")
    require("curate", ["ray"] * (c.executor == "ray"), "data", "ray")
    from nanollm.curate.pipeline import Curation

    return Curation.open(c)


def end(curation: "Curation", data: object, rank: int, tasks: int) -> None:
    """The last job in Slurm, as datatrove calls it."""
    curation.finish()
