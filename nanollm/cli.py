"""The command line: finds a verb's stage, runs it, and turns what goes wrong into one line and an exit code.

A verb is a module of `nanollm.stages`, imported only when it is asked for. stdout carries the result and nothing else.
Exit codes: 0 done, 2 the user's mistake (one line on stderr), 1 a fault of ours (a traceback), another process that
went away or a check that failed (one line), 130 interrupted.
"""

import importlib
import io
import keyword
import os
import sys
import traceback
import typing
from collections.abc import Sequence
from pathlib import Path

from nanollm import __version__
from nanollm.extras import require

VERBS = {
    "Start here": {
        "demo": "train a small model end to end on built-in text: offline, in minutes, on two CPU cores",
        "doctor": "check this machine and the installation, with advice and a short test run",
    },
    "Prepare": {
        "tokenizer": "train a tokenizer on a dataset or on your files",
        "preprocess": "turn text into token files",
        "curate": "turn web text into token files: filtered, deduplicated, also on a cluster",
    },
    "Train": {
        "pretrain": "train a model on token files",
        "sft": "fine-tune a model on conversations, so that it replies",
        "grpo": "train a model on its own graded replies to problems (GRPO)",
        "prefer": "train a model on preferences between replies (DPO, IPO, SimPO, KTO)",
        "distill": "train a small model to predict what a larger one predicts",
    },
    "Use": {
        "eval": "measure a model: problems solved, bits per byte, against another one",
        "generate": "continue prompts with a model",
        "chat": "talk to a model in the terminal",
        "serve": "serve an OpenAI-compatible API and a chat page",
        "bench": "measure inference speed on this machine",
        "info": "parameter count, memory and FLOPs of a model",
        "scale": "train small models to predict the loss of larger ones",
        "plan": "estimate memory, time and cost of a training run",
        "report": "write an HTML page of a run, or of several side by side",
    },
    "Exchange": {
        "export": "export a model for transformers, vLLM, llama.cpp or Ollama, and verify it",
        "import": "make a bundle from an exported model",
        "merge": "make a bundle from a bundle and a LoRA adapter of it",
        "average": "make a bundle from the mean of a run's newest checkpoints",
    },
}

MANY_PROCESSES = ("pretrain", "sft", "grpo", "prefer", "distill")
"""Verbs that torchrun may start."""

SHELLS = ("bash", "zsh", "fish", "powershell")
"""That complete what is typed behind `nanollm`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. argv None: the arguments of this process."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a narrow code page must not stop a run
    name = " ".join(["nanollm", *arguments[:1]]) if arguments and arguments[0] in all_verbs() else "nanollm"
    try:
        output = dispatch(arguments)
        if output is not None and not is_beside_main():
            print(str(output).rstrip("\n"))
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (head, less) has gone. Python flushes stdout once more at exit: give it somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except Exception as error:
        if is_users_mistake(error):
            print(f"{name}: {one_line(error)}", file=sys.stderr)
            return 1 if isinstance(error, ConnectionError) else 2
        traceback.print_exc()
        return 1


def is_beside_main() -> bool:
    """Whether this is one of several processes of torchrun, but not the one that speaks."""
    return processes() > 1 and os.environ.get("RANK", "0") != "0"


def processes() -> int:
    """How many torchrun started, this one included."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def dispatch(arguments: list[str]) -> object:
    """Do what the arguments say and return what belongs on stdout, if anything."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        return overview()
    if arguments[0] == "--version":
        return version()
    if arguments[0] == "--completion":
        return completion(arguments[1:])
    verb, *words = arguments
    from nanollm.config import did_you_mean, parse_options  # late: `nanollm --help` must not wait for YAML

    if verb not in all_verbs():
        hint = did_you_mean(verb, all_verbs(), f"the verbs are {', '.join(all_verbs())}")
        raise ValueError(f"unknown verb {verb!r}; {hint}")
    stage = importlib.import_module(module_of(verb))
    try:
        config, is_dry_run = parse_options(verb, stage, words)
    except SystemExit as stop:
        if stop.code:
            raise
        return None  # --help and --print_config have printed
    if processes() > 1 and (is_dry_run or verb not in MANY_PROCESSES):
        what = "--dry_run" if is_dry_run else f"nanollm {verb}"
        raise ValueError(f"{what} works in one process, got {processes()} from torchrun; run it without torchrun")
    return stage.plan(config) if is_dry_run else stage.run(config)


def module_of(verb: str) -> str:
    """The name of a verb's module: one that Python keeps for itself, such as import, has a _ behind it."""
    return f"nanollm.stages.{verb}{'_' * keyword.iskeyword(verb)}"


def all_verbs() -> list[str]:
    return [verb for group in VERBS.values() for verb in group]


def overview() -> str:
    """What `nanollm --help` prints; it must not import anything heavy."""
    width = max(map(len, all_verbs())) + 2
    lines = ["nanollm: train, run and measure your own small language model", "", "usage: nanollm VERB [options]"]
    for title, verbs in VERBS.items():
        lines += ["", title, *(f"  {verb:{width}}{summary}" for verb, summary in verbs.items())]
    lines += ["", "`nanollm VERB --help` lists the options of a verb, with defaults and units."]
    lines += [f"`nanollm --completion {'|'.join(SHELLS)}` prints what completes them in that shell."]
    return "\n".join(lines)


def version() -> str:
    """This version, and what it runs on."""
    import platform
    from importlib import metadata

    try:
        torch = metadata.version("torch")  # to import it would take a second
    except metadata.PackageNotFoundError:
        torch = "missing"
    return f"nanollm {__version__} (Python {platform.python_version()}, torch {torch}, {platform.platform(terse=True)})"


def completion(words: Sequence[str]) -> str:
    """The script, written by jsonargparse and shtab, that lets a shell complete what stands behind `nanollm`."""
    if len(words) != 1 or words[0] not in SHELLS:
        raise ValueError(f"--completion expects one of {', '.join(SHELLS)}, got {' '.join(words) or 'none'}")
    require("--completion", ["shtab"], "completion")
    import shtab
    from jsonargparse import ArgumentParser

    from nanollm.config import kinds_of, parser_of

    parser = ArgumentParser("nanollm", add_help=False)
    parser.add_argument("--version", action="store_true", help="Say which version this is, and stop.")
    parser.add_argument("--completion", choices=words, help="Print what completes commands in this shell, and stop.")
    below = parser.add_subcommands(required=False)
    for verb in all_verbs():
        stage = importlib.import_module(module_of(verb))
        kinds = kinds_of(stage)
        words_of_verb = parser_of(verb, stage, kinds)
        for action in words_of_verb._actions:  # a path or something else: shtab asks for a hint
            if Path in typing.get_args(kinds[action.dest]):
                vars(action)["complete"] = shtab.FILE
        below.add_subcommand(verb, words_of_verb)
    return parser.get_completion_script(f"shtab-{words[0]}")


def is_users_mistake(error: Exception) -> bool:
    """OSErrors are; a ValueError is if our own code raised it on purpose, and not a library underneath."""
    if isinstance(error, OSError):
        return True
    if not isinstance(error, ValueError) or isinstance(error, UnicodeError):
        return False
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return str(frames[-1].f_globals.get("__name__", "")).partition(".")[0] == "nanollm"


def one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.strerror}: {os.fspath(error.filename)}"
    return " ".join(str(error).split()) or type(error).__name__
