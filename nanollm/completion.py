"""What must a shell know to complete a command by itself?

The names of verbs and options, the words that an option knows, and which ones are files. All of it goes into one script
(shtab writes it), so that completing never waits for Python to start.
"""

import dataclasses
import typing
from argparse import Action, ArgumentParser
from collections.abc import Iterable
from pathlib import Path
from textwrap import shorten
from types import ModuleType
from typing import Any

import shtab

from nanollm import options
from nanollm.settings import preset_names


def script(target: str, verbs: Iterable[tuple[str, str, ModuleType]]) -> str:
    """The script for `target`, a shell that shtab knows; verbs: name, summary and stage of each."""
    parser = ArgumentParser("nanollm", description="Train, run and measure your own small language model.")
    parser.add_argument("--version", action="store_true", help="Say which version this is, and stop.")
    parser.add_argument("--completion", choices=[target], help="Print what completes commands in this shell, and stop.")
    below = parser.add_subparsers()
    for verb, summary, stage in verbs:
        describe(verb, stage, below.add_parser(verb, help=summary, add_help=False))
    return shtab.complete(parser, target)


def describe(verb: str, stage: ModuleType, parser: ArgumentParser) -> None:
    """Add what may stand behind a verb: its positional words, then its options."""
    kinds = options.kinds_of(stage)
    about = {action.dest: str(action.help) for action in options.parser_of(verb, stage, kinds)._actions}
    about |= {name: str(kind.__doc__) for name, kind in kinds.items() if dataclasses.is_dataclass(kind)}
    about = {name: shorten(text.partition(". ")[0], 90).replace("%", "%%") for name, text in about.items()}
    for name in getattr(stage, "POSITIONAL", ()):
        complete(parser.add_argument(name, nargs="?", help=about[name]), name, kinds[name])
    for name, kind in kinds.items():
        if name in options.SWITCHES:
            parser.add_argument(f"--{name}", action="store_true", help=about[name])
        else:
            takes = "*" if options.is_sequence(kind) else None
            complete(parser.add_argument(f"--{name}", nargs=takes, help=about[name]), name, kind)


def complete(action: Action, name: str, kind: Any) -> None:
    """Tell shtab what the value of an option of this type may be."""
    action.choices = words_of(name, kind) or None
    if action.choices is None and is_file(kind):
        action.complete = shtab.FILE  # type: ignore[attr-defined]


def words_of(name: str, kind: Any) -> list[str]:
    """The words that an option knows; none where it takes any."""
    inner = typing.get_args(kind)
    if kind is bool:
        return ["true", "false"]
    if typing.get_origin(kind) is typing.Literal:
        return [str(word) for word in inner]
    if dataclasses.is_dataclass(kind):
        return preset_names(name)
    return [word for part in inner for word in words_of("", part)]


def is_file(kind: Any) -> bool:
    """Whether a value may be a file or folder; a nested configuration may be a YAML file."""
    return kind is Path or dataclasses.is_dataclass(kind) or any(map(is_file, typing.get_args(kind)))
