"""How do a YAML file and the words of a command line become the frozen Config of a stage?

jsonargparse does it: types, nesting, help, --print_config. It gets two mappings: --config with its presets, and above
that the command line. Here is only what it lacks: the forms that people type, presets by name, mistakes in one line.
"""

import argparse
import difflib
import inspect
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from jsonargparse import SUPPRESS, ArgumentParser, DefaultHelpFormatter, set_parsing_settings

from nanollm.settings import load_preset, preset_names, read_mapping, to_yaml

# The sentinel tells a field without a value from one that is null, so that null is refused where it makes no sense.
set_parsing_settings(docstring_parse_attribute_docstrings=True, unset_sentinel=True)

SWITCHES = {"help": "--help", "print_config": "--print_config=skip_unset", "dry_run": "--dry_run"}

MOST_DIGITS = {"int": 18, "float": 308}  # what 64 bits can hold in any case

Kinds = Mapping[str, Any]  # dotted name of an option -> type of its value


def read(verb: str, stage: types.ModuleType, words: Sequence[str]) -> tuple[Any, bool]:
    """The Config of a stage, and whether --dry_run was given. --help and --print_config end in SystemExit."""
    kinds = kinds_of(stage)
    above = sort_words(words, kinds, getattr(stage, "POSITIONAL", ()))
    switches = [option for name, option in SWITCHES.items() if above.pop(name, None)]
    below = read_mapping(Path(above.pop("config"))) if "config" in above else {}
    below |= {name: above.pop(name) for name in list(above) if is_dataclass(kinds[name])}
    for name, value in below.items():
        if is_dataclass(kinds.get(name)) and not isinstance(value, dict) and str(value)[:1] != "{":
            below[name] = load_preset(name, str(value))
        elif is_sequence(kinds.get(name)) and isinstance(value, str):
            below[name] = [value]  # jsonargparse would take it for a file that lists the values
    refuse_odd(below, kinds)
    parser = parser_of(verb, stage, kinds)
    try:
        parsed = parser.parse_args([f"--config={to_yaml(below)}", f"--config={to_yaml(above)}", *switches])
    except argparse.ArgumentError as error:
        raise ValueError(explain(str(error), kinds)) from None
    values = parser.instantiate(parsed)
    return stage.Config(**{field.name: values[field.name] for field in fields(stage.Config)}), "dry_run" in parsed


def kinds_of(stage: types.ModuleType) -> Kinds:
    """Every option of a stage: the fields of its Config, nested ones under dotted names, --config and the switches."""

    def inside(config: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        for name, kind in typing.get_type_hints(config).items():
            yield prefix + name, kind
            if is_dataclass(kind):
                yield from inside(kind, f"{prefix}{name}.")

    switches = [name for name in SWITCHES if name != "dry_run" or hasattr(stage, "plan")]
    return dict(inside(stage.Config, "")) | {"config": Path} | dict.fromkeys(switches, bool)


def sort_words(words: Sequence[str], kinds: Kinds, positional: Sequence[str]) -> dict[str, Any]:
    """The text given for each option: a list takes all words up to the next option, a flag needs none."""
    sorter = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False, argument_default=SUPPRESS)
    for name, kind in kinds.items():
        takes: Any = {"nargs": "*"} if is_sequence(kind) else {"nargs": "?", "const": "true"} if kind is bool else {}
        spellings = dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}", *["-h"] * (name == "help")])
        sorter.add_argument(*spellings, dest=name, **takes)
    try:
        known, extra = sorter.parse_known_args(words)
    except argparse.ArgumentError as error:
        raise ValueError(str(error).removeprefix("argument ")) from None
    given = vars(known)
    for name, value in given.items():
        if kinds[name] is bool and value.lower() not in ("true", "false"):  # in `--json DIR`, DIR is not for --json
            given[name], extra = "true", [value, *extra]
    refuse_odd(given, kinds)
    if odd := [word for word in extra if word.startswith("--")]:
        raise ValueError(unknown(odd[0].partition("=")[0], kinds))
    if odd := extra[len(positional) :]:
        raise ValueError(f"did not expect {odd[0]!r} here; options start with --")
    if sum(word.partition("=")[0] == "--config" for word in words) > 1:
        raise ValueError("--config was given twice; put the settings into one file")
    return given | dict(zip(positional, extra, strict=False))


def refuse_odd(given: Mapping[str, Any], kinds: Kinds) -> None:
    """Refuse what jsonargparse takes or breaks at: paths of no letter, and whole numbers that are endless."""
    for name, value in leaves(given):
        kind = kinds.get(name) or kinds.get(name.rpartition(".")[0])  # the latter: of a mapping's values
        if kind is None:
            continue
        if value == "" and "path" in notation(kind):
            raise ValueError(f"{name}: expected a path, got an empty text")
        number = re.search(r"\b(int|float)\b", notation(kind))
        is_whole = isinstance(value, int) or (isinstance(value, str) and "path" not in notation(kind))
        if number and is_whole and re.fullmatch(rf"[-+]?\d{{{MOST_DIGITS[number[1]] + 1},}}", str(value)):
            raise ValueError(f"{name}: expected {notation(kind)}, got a number of {len(str(value))} digits")


def leaves(given: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of everything; of a list, each of its values."""
    for name, value in given.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield from ((f"{prefix}{name}", one) for one in (value if isinstance(value, list) else [value]))


def is_sequence(kind: Any) -> bool:
    return typing.get_origin(kind) in (list, tuple)


def parser_of(verb: str, stage: types.ModuleType, kinds: Kinds) -> ArgumentParser:
    usage = " ".join(["nanollm", verb, *map(str.upper, getattr(stage, "POSITIONAL", ())), "[--option value ...]"])
    about = inspect.cleandoc(stage.Config.__doc__).partition("\n\n")[0]
    parser = ArgumentParser(usage=usage, description=about, exit_on_error=False, formatter_class=Help)
    parser.add_argument("--config", action="config", help="YAML file of settings; options given here win over it.")
    if "dry_run" in kinds:
        parser.add_argument("--dry_run", action="store_true", default=SUPPRESS, help="Say what would be done; stop.")
    parser.add_class_arguments(stage.Config, None, as_group=False)
    for action in parser._actions:
        kind = kinds[action.dest]
        action.metavar = f"[{notation(kind)}]" if kind is bool else notation(kind, action.dest)
        action.option_strings = [word for word in action.option_strings if not word.endswith("+")]
        if action.dest == "print_config":
            action.metavar, action.help = "", "Print all settings as YAML, ready for --config; stop."
    return parser


class Help(DefaultHelpFormatter):
    """jsonargparse's help, where the placeholders alone say what to type."""

    def _get_type_str(self, action: argparse.Action) -> None:
        return None

    def _get_help_string(self, action: argparse.Action) -> str:
        text = super()._get_help_string(action).replace("required, default: %(default)s", "required")
        return text.removesuffix(" (required)") if preset_names(action.dest.partition(".")[0]) else text


def notation(kind: Any, name: str = "") -> str:
    """What to type for a value of this type: int, true|false, path ..., the presets of the nested dataclass `name`."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is dict:
        return "{" + ": ".join(map(notation, inner)) + ", ...}"
    if origin in (list, tuple):
        return f"{notation(inner[0])} ..." if origin is list else " ".join(map(notation, inner))
    if inner:
        return "|".join(map(str if origin is typing.Literal else notation, inner))
    if is_dataclass(kind):
        return "|".join([*preset_names(name), "file.yaml"])
    return {bool: "true|false", str: "text", Path: "path", types.NoneType: "null"}.get(kind) or str(kind.__name__)


def explain(message: str, kinds: Kinds) -> str:
    """One line out of jsonargparse's many: the option, what it takes, what came."""
    if match := re.match(r"(?:Group '(.+)' does not accept o|O)ption '(.+?)'", message):
        return unknown(".".join(filter(None, match.groups())), kinds)
    if message.startswith("the following arguments are required: "):
        names = [name.split(".") for name in message.partition("required: ")[2].split(", ")]
        asked = dict.fromkeys(parts[0] if preset_names(parts[0]) else ".".join(parts) for parts in names)
        return "missing " + ", ".join(f"--{name} {notation(kinds[name], name)}" for name in asked)
    keys = [key for key in re.findall(r'Parser key "([^"]+)"', message) if key in kinds and key != "config"]
    got = re.findall(r"(?:Got value: |Given value: |os.PathLike object, not )(.*)", message)
    return f"{keys[-1]}: expected {notation(kinds[keys[-1]])}, got {got[-1]}" if keys and got else message


def unknown(name: str, kinds: Kinds) -> str:
    """`unknown option ...; did you mean ...?`: by its last part, by initials (lr for learning_rate), or by spelling."""
    plain = name.removeprefix("--").replace("-", "_")
    last = plain.rpartition(".")[2]
    alike = {last, "".join(part[:1] for part in last.split("_"))}
    near = [other for other in kinds if other.rpartition(".")[2] in alike]
    near += difflib.get_close_matches(plain, kinds, n=1)
    return f"unknown option {name}; " + (f"did you mean {near[0]}?" if near else "--help lists them all")
