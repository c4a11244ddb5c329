"""The model card: what a model is, how it came to be, how good it is and how to run it.

README.md with the hub's metadata in front. Every figure in it stands in the bundle, its provenance, a manifest of token
files or an eval.json; what was not recorded or measured is said to be so.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from nanollm.bundle import PROVENANCE
from nanollm.durable import read_json, sha256_of, write_file
from nanollm.evals.results import lines
from nanollm.evals.stats import Figures
from nanollm.export.dense_to_moe import Format, exported_shape
from nanollm.export.provenance import Record, folders, name_of, public, stages
from nanollm.model.config import ModelConfig
from nanollm.progress import say
from nanollm.sources import gsm8k
from nanollm.sources.datasets import OPENWEBTEXT, SUPER_NATURAL_INSTRUCTIONS

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

CARD = "README.md"
LIBRARIES = {"compact": "transformers", "deepseek-v3": "transformers", "gguf": "llama.cpp"}
HUB_NAMES = {"owt": OPENWEBTEXT, "sni": SUPER_NATURAL_INSTRUCTIONS, "gsm8k": gsm8k.NAME}
DIGITS = 12  # of a sha256 that are shown

VLLM_WIDTHS = (320, 576)
"""Of the cache, for which vLLM has kernels of latent attention (get_supported_head_sizes in its mla_attention.py)."""
MAX_TOKENS = 128

TRANSFORMERS = """
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("NAME")
model = AutoModelForCausalLM.from_pretrained("NAME")
PROMPT
ids = model.generate(**prompt, max_new_tokens=TOKENS)[0, prompt["input_ids"].shape[1] :]
print(tokenizer.decode(ids, skip_special_tokens=True))
```
""".strip()
CHAT_PROMPT = """
messages = [{"role": "user", "content": "Which number comes after 7?"}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
""".strip()
BASE_PROMPT = 'prompt = tokenizer("Once upon a time", return_tensors="pt")'

VLLM = """
vLLM and SGLang read the same folder, and then answer like OpenAI's API (neither was run when this card was written):

```sh
vllm serve NAME --dtype bfloat16
python -m sglang.launch_server --model-path NAME --dtype bfloat16
```
""".strip()

GGUF = """
With llama.cpp, which then answers like OpenAI's API on port 8080:

```sh
llama-server -m FILE --jinja
```

With Ollama:

```sh
ollama create MODEL -f Modelfile
ollama run MODEL
```
""".strip()

FORMAT = """
```
<s><|system|>Answer briefly.<|end|><|user|>Which number comes after 7?<|end|><|assistant|>8<|end|>
```

The system's message may be left out. `chat_template.jinja` writes this, and refuses a message that spells one of these
marks; the template in an Ollama `Modelfile` cannot refuse, there such a text becomes the mark.
""".strip()

LIMITS = """
- It reads and writes {context:,} tokens at most.
- What is not among the results above was not measured, safety, bias and truthfulness included: what it writes may be
  wrong or harmful. Check it before you rely on it or show it to others.
""".strip()


@dataclass(frozen=True, kw_only=True)
class About:
    """What a card tells."""

    name: str
    """Its title."""
    address: str
    """What users load it by: USER/NAME on the hub, or a path."""
    is_base: bool
    """Whether it was only pretrained."""
    format: Format
    dtype: str
    """Of the numbers in the file: f32, bf16, f16 or q8_0."""
    config: ModelConfig
    """The shape of the bundle's model."""
    provenance: Record
    """The bundle's, as it is; the card shows names of paths only."""
    license: str
    """As the hub calls it: mit, apache-2.0, other, ..."""
    language: str | None = None
    """ISO 639 code, such as en."""
    gguf: str = "model.gguf"
    """Name of the file, for gguf."""
    evaluations: Sequence[Figures] = ()
    """See find_evaluations."""
    manifests: Mapping[str, Record] = field(default_factory=dict)
    """Of the token files that it was trained on, see provenance.find_manifests."""


def find_evaluations(bundle: Path) -> list[Figures]:
    """The eval/*/eval.json beside a bundle that are about this very bundle; those of other models are left out."""
    digest, found = sha256_of(bundle / PROVENANCE), []
    for file in sorted(Path(os.path.normpath(bundle / "..")).glob("eval/*/eval.json")):
        try:
            evaluation = read_json(file)
            measured = evaluation["bundle"]["digest"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is not what nanollm eval writes ({error}); measure again or delete it") from error
        if measured == digest:
            found.append(evaluation)
        else:
            say(f"{file} is about another model than {bundle}, or about an earlier one: the card leaves it out")
    return found


def write_card(folder: Path, about: About) -> None:
    """README.md in the folder of an exported model."""
    write_file(folder / CARD, card(about).encode())


def card(about: About) -> str:
    """The text of README.md."""
    can = "It continues texts; it was not taught to reply." if about.is_base else "It replies to messages."
    model = f"A language model of {about.config.total_parameters:,} parameters, made with NanoLLM. {can}"
    sections: dict[str, Iterator[str]] = {
        "The model": shape(about),
        "How it was made": history(about),
        "Results": results(about.evaluations),
        "How to run it": how_to_run(about.address, about.format, about.config, is_base=about.is_base, gguf=about.gguf),
        "Chat format": iter([] if about.is_base else [FORMAT]),
        "Limits": iter([LIMITS.format(context=about.config.context_length)]),
        "Licence": iter([f"{code(about.license)}. The texts that it was trained on have licences of their own."]),
    }
    parts = [f"---\n{metadata(about).to_yaml()}\n---", f"# {about.name}", model]
    for title, paragraphs in sections.items():
        if texts := list(paragraphs):
            parts += [f"## {title}", *texts]
    return "\n\n".join(parts) + "\n"


# --- how to run it ---


def how_to_run(name: str, form: str, c: ModelConfig, *, is_base: bool, gguf: str) -> Iterator[str]:
    """Paragraphs; `name` is what transformers loads ("." in the folder itself), `gguf` the file of llama.cpp."""
    if form == "gguf":
        yield GGUF.replace("FILE", gguf).replace("MODEL", Path(gguf).stem.lower())
        return
    yield f"With transformers{' 5 or newer' if form == 'compact' else ''}:"
    prompt = BASE_PROMPT if is_base else CHAT_PROMPT
    tokens = min(MAX_TOKENS, c.context_length // 2)
    yield TRANSFORMERS.replace("PROMPT", prompt).replace("TOKENS", str(tokens)).replace("NAME", name)
    if form == "deepseek-v3" and c.cache_width in VLLM_WIDTHS:
        yield VLLM.replace("NAME", name)
    elif form == "deepseek-v3":
        widths = " or ".join(map(str, VLLM_WIDTHS))
        yield f"vLLM's kernels take a cache of {widths} numbers per token and block, this model's has {c.cache_width}."


# --- metadata for the hub ---


def metadata(about: About) -> "ModelCardData":
    """What the hub sorts models by. Figures stand in the text alone."""
    from huggingface_hub import ModelCardData

    return ModelCardData(
        license=about.license,
        language=about.language,
        library_name=LIBRARIES[about.format],
        pipeline_tag="text-generation",
        tags=["nanollm", "mixture-of-experts", "multi-head-latent-attention", *["gguf"] * (about.format == "gguf")],
        datasets=sorted(datasets(about)) or None,
    )


def datasets(about: About) -> set[str]:
    """The datasets of the hub that it was trained on, as far as is recorded."""
    sources = [manifest["source"] for manifest in about.manifests.values()]
    tasks = [step.get("config", {}).get("task") for step in stages(about.provenance)]
    sources += [
        {"dataset": str(task.get("name")), "files": task.get("input")} for task in tasks if isinstance(task, dict)
    ]
    return {name for source in sources if "/" in (name := dataset_of(source))}


def dataset_of(source: Record) -> str:
    """The name of a dataset: on the hub, if it was read from there."""
    name = source["dataset"]
    if not source.get("files"):
        name = HUB_NAMES.get(name, name)
    is_on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists()
    return name if is_on_hub else name_of(name)


# --- paragraphs for people ---


def shape(about: About) -> Iterator[str]:
    """What it is made of."""
    c = about.config
    experts = f"{c.n_routed_experts} routed, {c.experts_per_token} of them per token, and {c.n_shared_experts} shared"
    rows = {
        "parameters": f"{c.total_parameters:,}, of which a token meets {c.active_parameters:,}",
        "blocks": f"{c.n_blocks}, of which {c.n_moe_blocks} with a Mixture of Experts",
        "experts": f"{experts}, each {c.d_expert:,} wide",
        "attention": f"latent, {c.n_heads} heads; its cache holds {c.cache_width} numbers per token and block",
        "width": f"{c.d_model:,}, {c.d_ff:,} in dense blocks",
        "vocabulary": f"{c.vocab_size:,}",
        "context": f"{c.context_length:,} tokens",
        "format": f"{about.format}, {about.dtype}",
    }
    yield "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
    stored = exported_shape(c, about.format)
    if stored != c:
        yield (
            f"The file holds {stored.total_parameters:,} parameters: it has a Mixture of Experts in each block after "
            f"the first {stored.n_dense_before_moe}, as engines expect it. Blocks without one are written as such, and "
            f"filled up with zeros, which changes no result beyond rounding."
        )


def history(about: About) -> Iterator[str]:
    """Each stage, the first first."""
    for number, step in enumerate(stages(about.provenance), start=1):
        try:
            found = list(told(step, about))
        except (AttributeError, KeyError, TypeError, ValueError):  # an imported history may hold anything
            found = ["what is recorded of this step cannot be read"]
        made_by = code(step.get("made_by", "not recorded"))
        yield "\n".join([f"{number}. {made_by}", *(f"   - {line}" for line in found)])
    yield f"Every setting is in `{PROVENANCE}`."


def told(step: Record, about: About) -> Iterator[str]:
    """What is recorded of a stage."""
    config = public(step.get("config", {}))
    for folder, digest in folders(step).items():
        yield f"data: {data(folder, digest, about.manifests)}"
    if task := config.get("task"):
        yield "task: " + ", ".join(f"{name} {code(value)}" for name, value in task.items() if value != [])
    if "train" in config:
        seen = [f"{step[key]:,} {key.removesuffix('_seen')}" for key in step if key.endswith("_seen")]
        yield ", ".join([f"{config['train']['steps']:,} optimizer steps", *seen])
    if optim := config.get("optim"):
        yield (
            f"{optim['name']}, learning rate {optim['lr']:g} at its peak, schedule {optim['schedule']} after "
            f"{optim['warmup_steps']:,} steps of warm-up, weight decay {optim['weight_decay']:g}"
        )
    if "seed" in config:
        yield f"seed {config['seed']}, computed in {config['dtype']} on {config['device']}"
    if not config:
        yield "data and settings are not recorded"
    for adoption in step.get("imports", []):
        yield f"imported from {code(adoption['folder'])}, {code('; '.join([adoption['format'], *adoption['changes']]))}"


def data(folder: str, digest: str, manifests: Mapping[str, Record]) -> str:
    """What token files hold, if they are still there to tell it."""
    named = f"{code(name_of(folder))} (manifest {digest[:DIGITS]})"
    if digest not in manifests:
        return f"{named}, made of what is not recorded"
    train = manifests[digest]["splits"]["train"]
    origin = code(dataset_of(manifests[digest]["source"]))
    return f"{named}, {train['tokens']:,} tokens in {train['documents']:,} documents of {origin}"


def results(evaluations: Sequence[Figures]) -> Iterator[str]:
    """What was measured."""
    if not evaluations:
        yield "Nothing was measured: there is no eval.json of this model."
        return
    yield "Of the bundle that this was exported from, in NanoLLM; in brackets the 95 % interval."
    for evaluation in evaluations:
        mine = {name: each for name, each in evaluation.items() if name in ("bundle", "settings", "contamination")}
        settings = evaluation["settings"]
        how = f"measured by {evaluation['made_by']} in {settings['dtype']}"
        if settings["task"]["name"] != "none":
            how += f", at most {settings['max_tokens']:,} tokens a reply"
        yield "\n".join(f"- {line}" for line in [*lines(public(mine)), how])


def code(value: object) -> str:
    """As code in Markdown, whatever it holds."""
    return f"`{' '.join(str(value).replace('`', chr(39)).split())}`"
