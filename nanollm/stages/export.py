"""Exports a bundle to transformers, vLLM, SGLang, llama.cpp or Ollama, and proves that it says the same there.

What needs the packages of the extra `export` is imported late, so that a missing one is named in one line.
"""

from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

from nanollm.bundle import Bundle, load_adapter, load_bundle, read_config, stored_dtype
from nanollm.config import check_at_least
from nanollm.durable import check_replaceable, new_folder, write_file
from nanollm.export.dense_to_moe import STORED, Dtype, Format, exported_shape
from nanollm.export.hub import check_metadata, check_push, push
from nanollm.export.widen import Widen
from nanollm.extras import require
from nanollm.model.lora import Adapter
from nanollm.progress import say

POSITIONAL = ("bundle",)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Export a bundle for other engines, with tokenizer, chat template and model card; none of our code is needed
    there."""

    bundle: Path
    """Folder of a bundle, such as runs/demo/grpo/bundle."""
    format: Format = "compact"
    """compact: for transformers, with no added parameters; deepseek-v3: also for vLLM and SGLang; gguf: for llama.cpp
    and Ollama; web: a chat page for any static host, with the GGUF and llama.cpp as WebAssembly."""
    wllama: Path | None = None
    """Folder node_modules with npm's @wllama/wllama and @wllama/wllama-compat, for web; null: loaded from npm."""
    widen: Widen = "auto"
    """auto: deepseek-v3 gets the width that vLLM has kernels of latent attention for, with the same results; off: it
    keeps its own."""
    adapter: Path | None = None
    """A LoRA adapter of the bundle, to be written beside its weights: compact: the folder adapter, for PEFT; gguf:
    adapter.gguf, for llama.cpp. --verify then compares both together with ours."""
    dtype: Literal["auto", "f32", "bf16", "f16", "q8_0"] = "auto"
    """Type of the weights; auto: as the bundle keeps them, for web q8_0. q8_0 (8.5 bits per weight) is for gguf and web
    only."""
    out: Path | None = None
    """Folder to write; null: export/FORMAT beside the bundle."""
    force: bool = False
    """Replace an earlier export at out."""
    name: str = ""
    """Model name in the card, such as USER/NAME on the hub; empty: nanollm- and its size."""
    license: str = "other"
    """Licence of the weights as the hub calls it: mit, apache-2.0, ..."""
    language: str | None = None
    """Language of the texts it was trained on, for the card: en, de, ..."""
    push: str | None = None
    """Upload the export to this repository of the Hugging Face hub, USER/NAME, once --verify has passed."""
    private: bool = True
    """Whether a repository created by --push is private."""
    verify: bool = False
    """Load the export in its engine (see --engine) and compare ids, logits and greedy replies with ours; exit code 1
    if they differ. An export that is there already is compared as it stands."""
    engine: Literal["auto", "vllm", "mlx"] = "auto"
    """Engine that --verify compares with; auto: transformers, for gguf llama.cpp. vllm and mlx need deepseek-v3."""
    engine_python: Path | None = None
    """Environment with vllm or mlx-lm, for --engine: its folder, or its Python; null: the environment of this
    command."""
    verify_prompts: int = 20
    """Number of prompts that both engines continue by 64 tokens, for --verify."""

    def __post_init__(self) -> None:
        if self.adapter is not None and self.format in ("deepseek-v3", "web"):
            raise ValueError(
                f"--adapter needs --format compact or gguf, got {self.format}; export the merged bundle instead"
            )
        if self.dtype.startswith("q") and self.format not in ("gguf", "web"):
            raise ValueError(f"--dtype {self.dtype} needs --format gguf or web; {self.format} takes f32, bf16 or f16")
        if self.wllama is not None and self.format != "web":
            raise ValueError(f"--wllama needs --format web, got {self.format}")
        if self.push is not None and self.format == "web":
            raise ValueError("--push needs a format for engines, got web; upload its folder to a static host")
        if self.engine != "auto" and (self.format != "deepseek-v3" or not self.verify):
            raise ValueError(f"--engine {self.engine} needs --verify and --format deepseek-v3, got {self.format}")
        check_at_least(1, self, "verify_prompts", prefix="--")
        check_metadata(self.license, self.language)

    @property
    def folder(self) -> Path:
        """Where the files go."""
        return self.out or self.bundle.absolute().parent / "export" / self.format


def plan(c: Config) -> str:
    """What would be written, and where."""
    check(c)
    if c.adapter is not None:
        open_adapter(c, load_bundle(c.bundle))
    parameters, size = parameters_of(c), f"about {size_of(c) / 1e6:,.1f} MB"
    return f"{c.format}, {dtype_of(c)}, {parameters:,} parameters ({size}), into {c.folder}"


def run(c: Config) -> Path:
    """The folder of the export."""
    check(c)
    from nanollm.export import card, folder, gguf, peft

    bundle, dtype = load_bundle(c.bundle), dtype_of(c)
    adapter = open_adapter(c, bundle)
    name = c.name or c.push or f"nanollm-{bundle.model.config.total_parameters / 1e6:.0f}M"
    if made := only_verifies(c):
        say(f"{c.folder} is an export already: it is compared as it stands")
        model_file = next((file for file in made if file.endswith(".gguf") and file != gguf.ADAPTER), "")
        prove(c, c.folder / model_file, bundle, adapter)
        return c.folder
    with new_folder(c.folder) as draft:
        if adapter is not None and c.format == "gguf":
            gguf.write_adapter(draft / gguf.ADAPTER, bundle.model.config, *adapter)
        elif adapter is not None:
            peft.write_peft(draft / peft.ADAPTER, bundle.model.config, *adapter)
        model_file = folder.write_export(draft, bundle, c.format, dtype, name, c.widen, c.wllama)
        text = card.card(
            bundle,
            c.format,
            dtype,
            name=name,
            license=c.license,
            widen=c.widen,
            language=c.language,
            file=model_file,
            evaluations=card.find_evaluations(c.bundle),
        )
        write_file(draft / card.CARD, text.encode())
    say(f"{c.format}, {dtype}, {parameters_of(c):,} parameters, written to {c.folder}")
    if c.verify:
        prove(c, c.folder / model_file, bundle, adapter)
    if c.push:
        say(f"pushed to {push(c.folder, c.push, private=c.private)}")
    return c.folder


def check(c: Config) -> None:
    """Whatever can be known to fail fails here, before anything is written."""
    require("export", ("gguf", "huggingface_hub", "tokenizers", "transformers"), "export")
    exported_shape(read_config(c.bundle), c.format, c.widen)
    if c.bundle.resolve().is_relative_to(c.folder.resolve()):
        raise ValueError(f"{c.folder} holds the bundle; choose another --out")
    from nanollm.export import engines, folder, web

    if not only_verifies(c):
        check_replaceable(c.folder, folder.read_made(c.folder).get("files", []), force=c.force, what="an export")
        if c.format == "web":
            web.check_size(size_of(c), f"this model in {dtype_of(c)}")
            web.find_wllama(c.wllama)
    if c.push:
        check_push(c.push)
    if c.engine != "auto":
        engines.find_python(c.engine, c.engine_python)
    elif c.verify and c.format in ("gguf", "web"):
        engines.package_folder()
        if c.format == "web":
            with web.chromium():
                pass
    elif c.verify and c.adapter is not None:
        require("export --adapter --verify", ("peft",), "export")


def open_adapter(c: Config, bundle: Bundle) -> Adapter | None:
    """The adapter to export, if any; ValueError for one of another bundle, or that its engine would not use in full."""
    if c.adapter is None:
        return None
    from nanollm.export import gguf

    lora, weights, _ = load_adapter(c.adapter, bundle)
    if c.format == "gguf":
        gguf.check_adapter(weights)
    return lora, weights


def only_verifies(c: Config) -> list[str]:
    """The files of an export of this format and type that is there already and is to be compared; else none."""
    from nanollm.export import folder, gguf, peft

    made = folder.read_made(c.folder)
    is_same = (made.get("format"), made.get("dtype")) == (c.format, dtype_of(c))
    if c.adapter is not None and is_same:
        is_same = (gguf.ADAPTER if c.format == "gguf" else peft.ADAPTER) in made["files"]
    return made["files"] if c.verify and is_same and not (c.force or c.push) else []


def dtype_of(c: Config) -> Dtype:
    """The type to write."""
    if c.dtype != "auto":
        return c.dtype
    return "q8_0" if c.format == "web" else STORED[stored_dtype(c.bundle)]


def parameters_of(c: Config) -> int:
    """Numbers in the file, with those that fill it up."""
    return exported_shape(read_config(c.bundle), c.format, c.widen).total_parameters


def size_of(c: Config) -> float:
    """Bytes of the weights, about."""
    from nanollm.export.folder import BYTES

    return parameters_of(c) * BYTES[dtype_of(c)]


def prove(c: Config, model: Path, bundle: Bundle, adapter: Adapter | None) -> None:
    """Print the table of --verify; SystemExit, which is exit code 1, if a line of it does not hold."""
    from nanollm.export import engines, verify, web

    if c.engine != "auto":
        checks = engines.compare_in_python(c.engine, c.engine_python, c.folder, bundle, dtype_of(c), c.verify_prompts)
    elif c.format in ("gguf", "web"):
        checks = engines.compare_in_llama_cpp(model, bundle, dtype_of(c), c.verify_prompts, adapter)
        if c.format == "web":
            checks = chain(checks, web.compare_in_browser(model, bundle, dtype_of(c), c.verify_prompts))
    else:
        checks = engines.compare_in_transformers(c.folder, bundle, dtype_of(c), c.verify_prompts, adapter)
    holds = True
    for check in checks:
        say(verify.line(check))
        holds &= check.holds
    if not holds:
        what = f"{c.bundle} says" if adapter is None else f"{c.bundle} says with {c.adapter}"
        raise SystemExit(
            f"nanollm export: {model} does not say what {what}" + ("; it was not pushed" if c.push else "")
        )
