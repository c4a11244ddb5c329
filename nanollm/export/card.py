"""Writes the model card: what a model is, how it came to be, how good it is and how to run it.

README.md with the hub's metadata in front, from the template card.md.jinja. Every figure in it stands in the bundle,
its provenance or an eval.json; what was not recorded or measured is said to be so.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from nanollm.bundle import PROVENANCE, Bundle
from nanollm.durable import read_json, sha256_of
from nanollm.evals.results import lines
from nanollm.evals.stats import Figures
from nanollm.export.dense_to_moe import Dtype, Format, exported_shape
from nanollm.export.provenance import Record, public, stages
from nanollm.export.widen import VLLM_WIDTHS, Widen
from nanollm.progress import say
from nanollm.report.tables import BITS, PERCENT, PLAIN

CARD = "README.md"
TEMPLATE = Path(__file__).with_name("card.md.jinja")


def find_evaluations(bundle: Path) -> list[Figures]:
    """The eval/*/eval.json beside a bundle that are about this very bundle; those of other models are left out."""
    digest, found = sha256_of(bundle / PROVENANCE), []
    for file in sorted(Path(os.path.normpath(bundle / "..")).glob("eval/*/eval.json")):
        evaluation = read_json(file)
        if evaluation.get("bundle", {}).get("digest") == digest:
            found.append(evaluation)
        else:
            say(f"{file} is about another model than {bundle}, or about an earlier one: the card leaves it out")
    return found


def card(
    bundle: Bundle,
    form: Format,
    dtype: Dtype,
    *,
    name: str,
    license: str,
    widen: Widen = "auto",
    language: str | None = None,
    file: str = "",
    evaluations: Sequence[Figures] = (),
) -> str:
    """The text of README.md.

    name: the title, and what transformers loads where it is USER/NAME; license and language as the hub calls them;
    file: the weights, for llama.cpp; evaluations: see find_evaluations.
    """
    from huggingface_hub import ModelCardData

    config = bundle.model.config
    stored = exported_shape(config, form, widen)
    metadata = ModelCardData(
        license=license,
        language=language,
        library_name="llama.cpp" if form in ("gguf", "web") else "transformers",
        pipeline_tag="text-generation",
        tags=["nanollm", "mixture-of-experts", "multi-head-latent-attention", *["gguf"] * (form in ("gguf", "web"))],
    )
    environment = Environment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    text = environment.from_string(TEMPLATE.read_text("utf-8")).render(
        metadata=metadata.to_yaml(),
        name=name,
        license=code(license),
        c=config,
        stored=stored,
        form=form,
        dtype=dtype,
        is_base=bundle.is_base,
        tools=bundle.tools,
        examples=public(bundle.examples),
        code=code,
        validation=list(validation(bundle.provenance)),
        history=list(history(bundle.provenance)),
        results=list(map(results, evaluations)),
        file=file,
        model=Path(file).stem.lower(),
        address=name if "/" in name else ".",
        runs_in_vllm=form == "deepseek-v3" and stored.cache_width in VLLM_WIDTHS,
    )
    return text + "\n"


def history(provenance: Record) -> Iterator[tuple[str, list[str]]]:
    """What made each stage, and what is recorded of it; the first first."""
    for step in stages(provenance):
        try:
            facts = list(facts_of(step))
        except (AttributeError, KeyError, TypeError, ValueError):  # an imported history may hold anything
            facts = ["what is recorded of this step cannot be read"]
        yield code(step.get("made_by", "not recorded")), facts


def facts_of(step: Record) -> Iterator[str]:
    """What is recorded of a stage: its data or task, and how long it took."""
    config = public(step.get("config", {}))
    if data := config.get("data"):
        yield "data: " + ", ".join(map(code, data if isinstance(data, Mapping) else [data]))
    if task := config.get("task"):
        yield f"task: {code(task['name'])}"
    if "train" in config:
        seen = [f"{step[key]:,} {key.removesuffix('_seen')}" for key in step if key.endswith("_seen")]
        yield ", ".join([f"{config['train']['steps']:,} optimizer steps", *seen])
    for imported in step.get("imports", []):
        yield f"imported from {code(imported['folder'])} ({code(imported['format'])})"


def validation(provenance: Record) -> Iterator[str]:
    """What the last stage measured of its model when it ended, on what it was not trained on."""
    metrics = provenance.get("metrics", {})
    for name, unit, what in (
        ("val_bpb", BITS, "of text"),
        ("val_loss", PLAIN, "nats per token"),
        ("val_accuracy", PERCENT, f"of {metrics.get('val_accuracy_n')} test problems solved, greedily"),
    ):
        if name in metrics:
            ends = {end: metrics.get(f"{name}_{end}") for end in ("low", "high")}
            yield f"{unit.write({'value': metrics[name], **ends})} {what}"


def results(evaluation: Figures) -> list[str]:
    """What was measured of this bundle alone."""
    mine = {name: each for name, each in evaluation.items() if name in ("bundle", "settings", "contamination")}
    return [*lines(public(mine)), f"measured by {evaluation['made_by']} in {evaluation['settings']['dtype']}"]


def code(value: object) -> str:
    """As code in Markdown, whatever it holds."""
    return f"`{' '.join(str(value).replace('`', chr(39)).split())}`"
