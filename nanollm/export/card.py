"""Writes the model card: what a model is, how it came to be, how good it is and how to run it.

README.md with the hub's metadata in front. Every figure in it stands in the bundle, its provenance, a manifest of token
files or an eval.json; what was not recorded or measured is said to be so.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nanollm.bundle import PROVENANCE, Bundle
from nanollm.durable import read_json, sha256_of
from nanollm.evals.results import lines
from nanollm.evals.stats import Figures
from nanollm.export.dense_to_moe import Dtype, Format, exported_shape
from nanollm.export.provenance import Record, find_manifests, folders, name_of, public, stages
from nanollm.model.config import ModelConfig
from nanollm.progress import say

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

CARD = "README.md"
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
    language: str | None = None,
    file: str = "",
    evaluations: Sequence[Figures] = (),
) -> str:
    """The text of README.md.

    name: the title, and what transformers loads where it is USER/NAME; license and language as the hub calls them;
    file: the weights, for llama.cpp; evaluations: see find_evaluations.
    """
    config, is_base = bundle.model.config, bundle.is_base
    can = "It continues texts; it was not taught to reply." if is_base else "It replies to messages."
    sections: dict[str, Iterator[str]] = {
        "The model": shape(config, form, dtype),
        "How it was made": history(bundle.provenance),
        "Results": results(evaluations),
        "How to run it": how_to_run(name if "/" in name else ".", form, config, is_base=is_base, file=file),
        "Chat format": iter([] if is_base else [FORMAT]),
        "Limits": iter([LIMITS.format(context=config.context_length)]),
        "Licence": iter([f"{code(license)}. The texts that it was trained on have licences of their own."]),
    }
    parts = [
        f"---\n{metadata(form, license, language).to_yaml()}\n---",
        f"# {name}",
        f"A language model of {config.total_parameters:,} parameters, made with NanoLLM. {can}",
    ]
    for title, paragraphs in sections.items():
        if texts := list(paragraphs):
            parts += [f"## {title}", *texts]
    return "\n\n".join(parts) + "\n"


def metadata(form: Format, license: str, language: str | None) -> "ModelCardData":
    """What the hub sorts models by."""
    from huggingface_hub import ModelCardData

    return ModelCardData(
        license=license,
        language=language,
        library_name="llama.cpp" if form == "gguf" else "transformers",
        pipeline_tag="text-generation",
        tags=["nanollm", "mixture-of-experts", "multi-head-latent-attention", *["gguf"] * (form == "gguf")],
    )


# --- the sections: paragraphs each ---


def shape(c: ModelConfig, form: Format, dtype: Dtype) -> Iterator[str]:
    experts = f"{c.n_routed_experts} routed, {c.experts_per_token} of them per token, and {c.n_shared_experts} shared"
    rows = {
        "parameters": f"{c.total_parameters:,}, of which a token meets {c.active_parameters:,}",
        "blocks": f"{c.n_blocks}, of which {c.n_moe_blocks} with a Mixture of Experts",
        "experts": f"{experts}, each {c.d_expert:,} wide",
        "attention": f"latent, {c.n_heads} heads; its cache holds {c.cache_width} numbers per token and block",
        "width": f"{c.d_model:,}, {c.d_ff:,} in dense blocks",
        "vocabulary": f"{c.vocab_size:,}",
        "context": f"{c.context_length:,} tokens",
        "format": f"{form}, {dtype}",
    }
    yield "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
    stored = exported_shape(c, form)
    if stored != c:
        yield (
            f"The file holds {stored.total_parameters:,} parameters: it has a Mixture of Experts in each block after "
            f"the first {stored.n_dense_before_moe}, as engines expect it. Blocks without one are written as such, and "
            f"filled up with zeros, which changes no result beyond rounding."
        )


def history(provenance: Record) -> Iterator[str]:
    """Each stage, the first first."""
    manifests = find_manifests(provenance)
    lines = []
    for number, step in enumerate(stages(provenance), start=1):
        try:
            facts = list(facts_of(step, manifests))
        except (AttributeError, KeyError, TypeError, ValueError):  # an imported history may hold anything
            facts = ["what is recorded of this step cannot be read"]
        lines += [f"{number}. {code(step.get('made_by', 'not recorded'))}", *(f"   - {fact}" for fact in facts)]
    yield "\n".join(lines)
    yield f"Every setting is in `{PROVENANCE}`."


def facts_of(step: Record, manifests: Mapping[str, Record]) -> Iterator[str]:
    """What is recorded of a stage: its data or task, and how long it took."""
    config = public(step.get("config", {}))
    for folder, digest in folders(step).items():
        if digest in manifests:
            train, source = manifests[digest]["splits"]["train"], name_of(manifests[digest]["source"]["dataset"])
            origin = f"{train['tokens']:,} tokens in {train['documents']:,} documents of {code(source)}"
        else:
            origin = "made of what is not recorded"
        yield f"data: {code(name_of(folder))} (manifest {digest[:DIGITS]}), {origin}"
    if task := config.get("task"):
        yield f"task: {code(task['name'])}"
    if "train" in config:
        seen = [f"{step[key]:,} {key.removesuffix('_seen')}" for key in step if key.endswith("_seen")]
        yield ", ".join([f"{config['train']['steps']:,} optimizer steps", *seen])
    for imported in step.get("imports", []):
        yield f"imported from {code(imported['folder'])} ({code(imported['format'])})"


def results(evaluations: Sequence[Figures]) -> Iterator[str]:
    """What was measured of this bundle alone."""
    if not evaluations:
        yield "Nothing was measured: there is no eval.json of this model."
        return
    yield "Of the bundle that this was exported from, in NanoLLM; in brackets the 95 % interval."
    for evaluation in evaluations:
        mine = {name: each for name, each in evaluation.items() if name in ("bundle", "settings", "contamination")}
        how = f"measured by {evaluation['made_by']} in {evaluation['settings']['dtype']}"
        yield "\n".join(f"- {line}" for line in [*lines(public(mine)), how])


def how_to_run(address: str, form: Format, c: ModelConfig, *, is_base: bool, file: str) -> Iterator[str]:
    """address is what transformers loads ("." in the folder itself), file the GGUF of llama.cpp."""
    if form == "gguf":
        yield GGUF.replace("FILE", file).replace("MODEL", Path(file).stem.lower())
        return
    yield f"With transformers{' 5 or newer' if form == 'compact' else ''}:"
    prompt = BASE_PROMPT if is_base else CHAT_PROMPT
    tokens = min(MAX_TOKENS, c.context_length // 2)
    yield TRANSFORMERS.replace("PROMPT", prompt).replace("TOKENS", str(tokens)).replace("NAME", address)
    if form == "deepseek-v3" and c.cache_width in VLLM_WIDTHS:
        yield VLLM.replace("NAME", address)
    elif form == "deepseek-v3":
        widths = " or ".join(map(str, VLLM_WIDTHS))
        yield f"vLLM's kernels take a cache of {widths} numbers per token and block, this model's has {c.cache_width}."


def code(value: object) -> str:
    """As code in Markdown, whatever it holds."""
    return f"`{' '.join(str(value).replace('`', chr(39)).split())}`"
