"""A bundle becomes a model that transformers, vLLM, SGLang, llama.cpp or Ollama run, with proof."""

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from nanollm.bundle import PROVENANCE, Bundle, load_bundle, read_config, stored_dtype
from nanollm.durable import check_replaceable, new_folder, read_json
from nanollm.export.dense_to_moe import STORED, Dtype, Format, exported_shape
from nanollm.extras import missing_package
from nanollm.progress import say

POSITIONAL = ("bundle",)
EXTRA = ("gguf", "huggingface_hub", "protobuf", "tokenizers", "transformers")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Write a bundle for other engines: without any code of ours, with tokenizer, chat template and model card."""

    bundle: Path
    """Folder of a bundle, such as runs/demo/grpo/bundle."""
    format: Format = "compact"
    """compact: for transformers, without a parameter more; deepseek-v3: for vLLM and SGLang too; gguf: for llama.cpp
    and Ollama."""
    dtype: Literal["auto", "f32", "bf16", "f16", "q8_0"] = "auto"
    """Type of the weights; auto: as the bundle keeps them. q8_0 (8 bits and a little) is for gguf only."""
    out: Path | None = None
    """Folder to write; null: export/FORMAT beside the bundle."""
    force: bool = False
    """Replace an earlier export at out."""
    name: str = ""
    """What the model is called in its card; empty: the name of --push, or nanollm- and its size."""
    license: str = "other"
    """Licence of the weights as the hub calls it: mit, apache-2.0, ..."""
    language: str | None = None
    """Language of the texts it was trained on, for the card: en, de, ..."""
    verify: bool = False
    """Load the export in its engine (transformers, llama.cpp) and compare ids, logits and greedy replies with ours;
    exit code 1 if they differ. An export that is there already is compared as it stands, unless --force replaces it."""
    verify_prompts: int = 20
    """Prompts that both continue by 64 tokens, for --verify."""
    push: str | None = None
    """Repository of the Hugging Face hub to put it into: USER/NAME."""
    private: bool = True
    """Whether a repository that --push makes can be read by its owner only."""

    def __post_init__(self) -> None:
        if self.dtype == "q8_0" and self.format != "gguf":
            raise ValueError(f"--dtype q8_0 is for --format gguf; {self.format} takes f32, bf16 or f16")
        if self.verify_prompts < 1:
            raise ValueError(f"verify_prompts must be at least 1, got {self.verify_prompts}")

    @property
    def folder(self) -> Path:
        """Where the files go."""
        return self.out or self.bundle.absolute().parent / "export" / self.format


def plan(c: Config) -> str:
    """The files that would be written, with their sizes, and where they would go."""
    check(c)
    from nanollm.export import folder

    dtype = dtype_of(c)
    size = f"about {folder.weight_bytes(read_config(c.bundle), c.format, dtype) / 1e6:,.1f} MB"
    lines = [f"{folder.model_file(c.format, dtype, title_of(c))} ({size})", *folder.other_files(c.format)]
    place = f", and in the {'private' if c.private else 'public'} repository {c.push}" if c.push else ""
    return "\n".join([*lines, f"in {c.folder}{place}"])


def run(c: Config) -> Path:
    """The folder of the export."""
    check(c)
    from nanollm.export import folder, hub

    if c.push:
        hub.check_access()
    bundle, dtype, name = load_bundle(c.bundle), dtype_of(c), title_of(c)
    if only_verifies(c):
        say(f"{c.folder} is an export already: it is compared as it stands")
    else:
        with new_folder(c.folder) as draft:
            folder.write_export(draft, bundle, c.format, dtype, name)
            write_card(c, draft, bundle)
        parameters = exported_shape(bundle.model.config, c.format).total_parameters
        say(f"{c.format}, {dtype}, {parameters:,} parameters, written to {c.folder}")
    if c.verify:
        prove(c, c.folder / folder.model_file(c.format, dtype, name), bundle)
    if c.push:
        say(f"pushed to {hub.push(c.folder, c.push, private=c.private)}")
    return c.folder


def check(c: Config) -> None:
    """Whatever can be known to fail fails here, before anything is written."""
    for package in EXTRA:
        try:
            version(package)
        except PackageNotFoundError as error:
            raise missing_package("export", package, "export") from error
    read_config(c.bundle)
    check_out(c)
    if c.push:
        from nanollm.export.hub import check_name

        check_name(c.push)
    if c.verify and c.format == "gguf":
        from nanollm.export.engines import package_folder

        package_folder()


def check_out(c: Config) -> None:
    """Refuse a folder where something would be lost."""
    from nanollm.export.folder import written_in

    if c.bundle.resolve().is_relative_to(c.folder.resolve()):
        raise ValueError(f"{c.folder} holds the bundle; choose another --out")
    if not only_verifies(c):
        check_replaceable(c.folder, written_in(c.folder), force=c.force, what="an export")


def only_verifies(c: Config) -> bool:
    """Whether the export that would be written and compared is there already, with that format, type and file."""
    from nanollm.export.folder import EXPORT, model_file, written_in

    if not c.verify or c.force or c.push or not written_in(c.folder):
        return False
    made, file = read_json(c.folder / PROVENANCE)[EXPORT], model_file(c.format, dtype_of(c), title_of(c))
    is_named = c.format != "gguf" or file in made["files"]  # the weights of other formats may lie in several files
    return is_named and (made.get("format"), made.get("dtype")) == (c.format, dtype_of(c))


def dtype_of(c: Config) -> Dtype:
    """The type to write."""
    return STORED[stored_dtype(c.bundle)] if c.dtype == "auto" else c.dtype


def title_of(c: Config) -> str:
    """What the card calls the model."""
    size = read_config(c.bundle).total_parameters / 1e6
    return c.name or c.push or f"nanollm-{size:.0f}M"


def write_card(c: Config, draft: Path, bundle: Bundle) -> None:
    """README.md, with what was measured of this very bundle."""
    from nanollm.export import card, folder
    from nanollm.export.provenance import find_manifests

    dtype, name = dtype_of(c), title_of(c)
    about = card.About(
        name=name,
        address=c.push or ".",
        is_base=bundle.is_base,
        format=c.format,
        dtype=dtype,
        config=bundle.model.config,
        provenance=bundle.provenance,
        license=c.license,
        language=c.language,
        gguf=folder.model_file(c.format, dtype, name),
        evaluations=card.find_evaluations(c.bundle),
        manifests=find_manifests(bundle.provenance),
    )
    card.write_card(draft, about)


def prove(c: Config, model: Path, bundle: Bundle) -> None:
    """Print the table of --verify; SystemExit, which is exit code 1, if a line of it does not hold."""
    from nanollm.export import engines, verify

    if c.format == "gguf":
        checks = engines.compare_in_llama_cpp(model, bundle, dtype_of(c), c.verify_prompts)
    else:
        checks = engines.compare_in_transformers(c.folder, bundle, dtype_of(c), c.verify_prompts)
    holds = True
    for check in checks:
        say(verify.line(check))
        holds &= check.holds
    if not holds:
        raise SystemExit(f"nanollm export: {model} does not say what {c.bundle} says; it was not pushed")
