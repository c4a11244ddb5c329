"""Writes the files of an export, for every format."""

from pathlib import Path
from typing import Any

from nanollm import __version__
from nanollm.bundle import PROVENANCE, WEIGHTS, Bundle
from nanollm.durable import read_json, write_file, write_json
from nanollm.export.card import CARD
from nanollm.export.dense_to_moe import Dtype, Format
from nanollm.export.gguf import file_name, modelfile, write_gguf
from nanollm.export.hf import DTYPES, generation_config, write_model
from nanollm.export.provenance import check, public
from nanollm.export.tokenizer_json import write_tokenizer
from nanollm.export.web import write_web
from nanollm.export.widen import Widen

BYTES = {"f32": 4.0, "bf16": 2.0, "f16": 2.0, "q8_0": 34 / 32}  # of a number; 32 of q8_0 share a scale of two bytes
EXPORT = "export"  # the word of provenance.json that says which files this export wrote


def read_made(folder: Path) -> dict[str, Any]:
    """What an earlier export wrote into a folder: format, dtype and files; empty if there was none."""
    try:
        made = read_json(folder / PROVENANCE)[EXPORT]
        return {**made, "files": [str(name) for name in made["files"]]}
    except (OSError, ValueError, KeyError, TypeError):  # whatever it is, it is not an export's
        return {}


def write_export(
    folder: Path,
    bundle: Bundle,
    form: Format,
    dtype: Dtype,
    name: str,
    widen: Widen = "auto",
    wllama: Path | None = None,
) -> str:
    """Everything but the card, into an empty folder; returns the name of the file with the weights.

    ValueError for what the engine cannot run. More than hf.SHARD_BYTES of safetensors lie in several files.
    """
    check(bundle.provenance)
    tokenizer, context = bundle.tokenizer, bundle.model.config.context_length
    if form == "web":
        model_file = write_web(folder, bundle, dtype, name, wllama)
    elif form == "gguf":
        model_file = file_name(name, dtype)
        write_gguf(folder / model_file, bundle, dtype, name)
        write_file(folder / "Modelfile", modelfile(model_file, context, is_base=bundle.is_base).encode())
    else:
        model_file = WEIGHTS
        write_model(folder, bundle, form, DTYPES[dtype], widen)
    if form != "web":
        write_tokenizer(folder, tokenizer, context)
        write_json(folder / "generation_config.json", generation_config(tokenizer))
    files = sorted({CARD, PROVENANCE, *(file.name for file in folder.iterdir())})
    made = {"made_by": f"nanollm {__version__} export", "format": form, "dtype": dtype, "files": files}
    told = {name: value for name, value in public(bundle.provenance).items() if name != "format"}  # that of a bundle
    write_json(folder / PROVENANCE, told | {EXPORT: made})
    return model_file
