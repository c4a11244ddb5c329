"""The files of an export, for every format."""

import re
from pathlib import Path
from typing import get_args

from nanollm import __version__
from nanollm.bundle import CONFIG, PROVENANCE, WEIGHTS, Bundle, build_model
from nanollm.durable import read_json, write_file, write_json
from nanollm.export.card import CARD
from nanollm.export.dense_to_moe import Dtype, Format, exported_shape
from nanollm.export.gguf import GgufType, modelfile, tensors, type_of, write_gguf
from nanollm.export.hf import DTYPES, generation_config, write_model
from nanollm.export.provenance import check, public
from nanollm.export.tokenizer_json import TOKENIZER_FILES, write_tokenizer
from nanollm.model.config import ModelConfig

BYTES = {"f32": 4.0, "bf16": 2.0, "f16": 2.0, "q8_0": 34 / 32}  # of a number; 32 of q8_0 share a scale of two bytes
GENERATION, MODELFILE = "generation_config.json", "Modelfile"
EVERYWHERE = (*TOKENIZER_FILES, GENERATION, PROVENANCE, CARD)
EXPORT = "export"
"""The word of provenance.json that says which files this export wrote."""


def model_file(form: Format, dtype: Dtype, name: str) -> str:
    """The file with the weights; more than hf.SHARD_BYTES of safetensors lie in several."""
    plain = re.sub(r"[^\w.-]+", "-", name.rpartition("/")[2])
    return f"{plain}-{dtype.upper()}.gguf" if form == "gguf" else WEIGHTS


def other_files(form: Format) -> list[str]:
    """The files beside the weights."""
    return sorted([*EVERYWHERE, MODELFILE if form == "gguf" else CONFIG])


def weight_bytes(config: ModelConfig, form: Format, dtype: Dtype) -> float:
    """Of the model's numbers in the file."""
    shape = exported_shape(config, form)
    if form != "gguf":
        return shape.total_parameters * BYTES[dtype]
    named = tensors(build_model(shape).state_dict(), shape)
    return sum(tensor.numel() * BYTES[type_of(name, tensor, dtype)] for name, tensor in named)


def written_in(folder: Path) -> list[str]:
    """The files that an earlier export wrote into a folder; none if there was none."""
    try:
        return [str(name) for name in read_json(folder / PROVENANCE)[EXPORT]["files"]]
    except (OSError, ValueError, KeyError, TypeError):  # whatever it is, it is not an export's
        return []


def write_export(folder: Path, bundle: Bundle, form: Format, dtype: Dtype, name: str) -> None:
    """Everything but the card, into an empty folder; ValueError for what the engine cannot run."""
    assert dtype in get_args(GgufType) if form == "gguf" else dtype in DTYPES
    check(bundle.provenance)
    tokenizer, context = bundle.tokenizer, bundle.model.config.context_length
    if form == "gguf":
        file = model_file(form, dtype, name)
        write_gguf(folder / file, bundle, dtype, name)
        write_file(folder / MODELFILE, modelfile(file, context, is_base=bundle.is_base).encode())
    else:
        write_model(folder, bundle, form, DTYPES[dtype])
    write_tokenizer(folder, tokenizer, context)
    write_json(folder / GENERATION, generation_config(tokenizer))
    files = sorted({CARD, PROVENANCE, *(file.name for file in folder.iterdir())})
    made = {"made_by": f"nanollm {__version__} export", "format": form, "dtype": dtype, "files": files}
    told = {name: value for name, value in public(bundle.provenance).items() if name != "format"}  # that of a bundle
    write_json(folder / PROVENANCE, told | {EXPORT: made})
