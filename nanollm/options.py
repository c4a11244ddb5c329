"""How do a YAML file and a command line become the frozen Config of a stage?

Every field of Config, nested ones under dotted names, is an option. The command line wins over --config, which wins
over the defaults. Everything is gathered as one mapping; jsonargparse turns its values into the types of the fields.
"""

import argparse
import ast
import dataclasses
import difflib
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonargparse

from nanollm import settings

MISSING = dataclasses.MISSING


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option:
    """One field of a Config, or of a dataclass nested in it."""

    name: str
    """Dotted path, as in optim.lr."""
    kind: Any
    """The annotation, without the `| None` around a nested dataclass."""
    default: Any
    doc: str

    @property
    def is_group(self) -> bool:
        return dataclasses.is_dataclass(self.kind)

    @property
    def is_sequence(self) -> bool:
        return any(typing.get_origin(kind) in (list, tuple) for kind in alternatives(self.kind))

    @property
    def is_flag(self) -> bool:
        return self.kind is bool

    @property
    def is_text(self) -> bool:
        """Whether a value means what was typed: YAML would read `# Title` or `~` as nothing."""
        return set(alternatives(self.kind)) <= {str, Path, types.NoneType}


@dataclasses.dataclass
class Given:
    """What the user typed. Values are flat, by dotted name."""

    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    groups: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Values of nested dataclasses given whole, as in --model nano-5m; single values win over them."""
    config_file: str | None = None
    switches: set[str] = dataclasses.field(default_factory=set)


SWITCHES = {
    "help": "Show this text and stop.",
    "print_config": "Print the settings as YAML, ready for --config, and stop.",
    "dry_run": "Say what would be done, and stop.",
}


# From a dataclass to options


def options_of(config: Any, prefix: str = "", instance: Any = None) -> Iterator[Option]:
    """Every field of a dataclass; a nested dataclass gives itself and then its own fields."""
    hints, docs = typing.get_type_hints(config), attribute_docs(config)
    for field in dataclasses.fields(config):
        default = default_of(field) if instance is None else getattr(instance, field.name)
        inner = [kind for kind in alternatives(hints[field.name]) if dataclasses.is_dataclass(kind)]
        kind = inner[0] if len(inner) == 1 else hints[field.name]
        option = Option(name=prefix + field.name, kind=kind, default=default, doc=docs.get(field.name, ""))
        yield option
        if option.is_group:
            yield from options_of(kind, f"{option.name}.", None if default is MISSING else default)


def default_of(field: dataclasses.Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def attribute_docs(config: type) -> dict[str, str]:
    """The string below each field, inherited fields included."""
    docs: dict[str, str] = {}
    for cls in reversed([cls for cls in config.__mro__ if dataclasses.is_dataclass(cls)]):
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, below in pairwise(body.body):
            if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
                continue
            if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                docs[field.target.id] = inspect.cleandoc(str(below.value.value)).replace("\n", " ")
    return docs


def alternatives(kind: Any) -> tuple[Any, ...]:
    """The members of a union; any other type alone."""
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)


def type_name(kind: Any) -> str:
    """A type in words a user would choose."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if len(alternatives(kind)) > 1:
        return " or ".join(type_name(member) for member in inner)
    if origin is typing.Literal:
        return " or ".join(map(str, inner))
    if origin in (list, tuple) and (origin is list or inner[-1] is ...):
        return f"a list of {type_name(inner[0])}"
    if origin is tuple:
        return f"{len(inner)} values ({', '.join(map(type_name, inner))})"
    names: dict[Any, str] = {
        int: "int",
        float: "float",
        bool: "true or false",
        str: "text",
        Path: "path",
        types.NoneType: "null",
    }
    return names.get(kind) or str(getattr(kind, "__name__", kind))


# From words to values


def read_arguments(
    arguments: list[str], options: Mapping[str, Option], positional: tuple[str, ...], switches: Mapping[str, str]
) -> Given:
    """Sort the words of a command line; values stay text until their types are known."""
    given = Given()
    free = list(positional)
    words = list(arguments)
    while words:
        word = words.pop(0)
        if word == "-h":
            word = "--help"
        if not word.startswith("--"):
            if not free:
                raise ValueError(f"did not expect {word!r} here; options start with --")
            option = options[free.pop(0)]
            add(given, option, [word, *take_values(words)] if option.is_sequence else [word], options)
            continue
        typed, equals, value = word[2:].partition("=")
        name = typed.replace("-", "_")
        if name in switches and not equals:
            given.switches.add(name)
        elif name == "config":
            if given.config_file is not None:
                raise ValueError("--config was given twice; put the settings into one file")
            given.config_file = value if equals else take_value(words, "--config", "a YAML file")
        elif name in options:
            add(given, options[name], [value] if equals else take(words, options[name]), options)
        else:
            raise ValueError(f"unknown option --{typed}{did_you_mean(name, [*options, 'config', *switches])}")
    return given


def add(given: Given, option: Option, words: list[str], options: Mapping[str, Option]) -> None:
    """Write down one option and its words."""
    if option.is_group:
        value = settings.parse_yaml(words[0], f"--{option.name}") if words[0][:1] == "{" else words[0]
        whole = read_group(option, None if value == "null" else value, options, f"--{option.name}")
        given.groups = overlay(given.groups, whole)
    else:
        given.values[option.name] = one_value(option, words)


def take(words: list[str], option: Option) -> list[str]:
    """The words that belong to an option: all up to the next option for a list, none needed for a flag, else one."""
    if option.is_sequence:
        return take_values(words)
    if option.is_flag:
        return [words.pop(0)] if words and words[0].lower() in ("true", "false") else ["true"]
    return [take_value(words, f"--{option.name}", type_name(option.kind))]


def take_values(words: list[str]) -> list[str]:
    taken: list[str] = []
    while words and not words[0].startswith("--"):
        taken.append(words.pop(0))
    return taken


def take_value(words: list[str], option: str, expected: str) -> str:
    if not words or words[0].startswith("--"):
        raise ValueError(f"{option} expects a value ({expected}); write {option}=VALUE if the value starts with --")
    return words.pop(0)


def one_value(option: Option, words: list[str]) -> Any:
    """The words of an option as its value: a list, unless the one word is written as a YAML list."""
    kinds = alternatives(option.kind)
    if words == ["null"] and types.NoneType in kinds:
        return None
    if words == [""] and Path in kinds:
        raise ValueError(f"{option.name}: expected a path, got an empty text")
    is_list = option.is_sequence and not (len(words) == 1 and words[0].startswith("["))
    return words if is_list else words[0]


def read_settings(
    mapping: Mapping[str, Any], options: Mapping[str, Option], origin: str, prefix: str = ""
) -> dict[str, Any]:
    """Nested settings as flat values; every key must be an option."""
    values: dict[str, Any] = {}
    for key, value in mapping.items():
        name = f"{prefix}{key}"
        if name not in options:
            raise ValueError(f"{origin}: unknown option {name}{did_you_mean(name, options)}")
        option = options[name]
        if option.is_group:
            values |= read_group(option, value, options, origin)
        else:
            # jsonargparse would read a lone path as a file that lists paths.
            values[name] = one_value(option, [value]) if isinstance(value, str) else value
    return values


def read_group(option: Option, value: Any, options: Mapping[str, Option], origin: str) -> dict[str, Any]:
    """A nested dataclass from a mapping, or from the name or path of a preset.

    The name of the group itself stays among the values, as the mark that it was given whole.
    """
    if isinstance(value, str):
        preset = settings.find_preset(option.name.rpartition(".")[2], value)
        value, origin = settings.read_mapping(preset), str(preset)
    if value is None:
        return {option.name: None}
    if not isinstance(value, Mapping):
        raise ValueError(f"{origin}: {option.name} must be the name of a preset or `key: value` lines, got {value!r}")
    return {option.name: {}} | read_settings(value, options, origin, f"{option.name}.")


def overlay(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """The values above win; a group given whole above hides what lay below it."""
    hidden = tuple(f"{name}." for name, value in above.items() if value == {} or value is None)
    return {name: value for name, value in below.items() if not name.startswith(hidden)} | dict(above)


def did_you_mean(name: str, known: Collection[str]) -> str:
    """`; did you mean ...?`: by spelling, by the last part of the name, or by abbreviation (lr for learning_rate)."""
    group, _, last = name.rpartition(".")
    near = difflib.get_close_matches(name, known, n=1)
    near += [other for other in known if other.rpartition(".")[2] == last]
    near += [other for other in known if other.rpartition(".")[0] == group and abbreviates(other[len(group) :], last)]
    return f"; did you mean {near[0]}?" if near else "; --help lists them all"


def abbreviates(short: str, long: str) -> bool:
    """Whether the letters of `short` stand in `long` in this order, the first one first."""
    letters = iter(long)
    short = short.removeprefix(".")
    return short[0] == long[:1] and all(letter in letters for letter in short)


# From values to a Config


def undecided(options: Mapping[str, Option], values: Mapping[str, Any]) -> Iterator[Option]:
    """Options without a value. A nested dataclass of which nothing is given stands for all its fields if it has a
    default or presets, because then nobody would give them one by one."""
    whole: tuple[str, ...] = ()  # beginnings of the names that a group stands for
    for name, option in options.items():
        if name.startswith(whole):
            continue
        if not option.is_group:
            if name not in values:
                yield option
        elif name in values:
            whole += (f"{name}.",) if values[name] is None else ()
        elif (option.default is MISSING and settings.preset_names(name)) or (
            option.default is not MISSING and not any(given.startswith(f"{name}.") for given in values)
        ):
            whole += (f"{name}.",)
            yield option


def missing(options: Mapping[str, Option], values: Mapping[str, Any]) -> list[Option]:
    """What the user must still say."""
    return [option for option in undecided(options, values) if option.default is MISSING]


def ask_for(option: Option, positional: tuple[str, ...]) -> str:
    """A missing option, with what it wants."""
    typed = option.name.upper() if option.name in positional else f"--{option.name}"
    if option.is_group:
        return f"{typed} (one of {', '.join(settings.preset_names(option.name))}, or a YAML file)"
    return f"{typed} ({type_name(option.kind)}: {option.doc.rstrip('.')})"


def build(config: type, options: Mapping[str, Option], values: Mapping[str, Any]) -> Any:
    """Check every type and construct the Config; its own __post_init__ checks the rest."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", type=config)
    try:
        parsed = parser.parse_object({"config": nested(values)})
    except argparse.ArgumentError as error:
        raise ValueError(explain(str(error), options, values)) from None
    for name, value in values.items():
        if isinstance(value, str) and options[name].is_text:
            parsed[f"config.{name}"] = Path(value) if Path in alternatives(options[name].kind) else value
    return parser.instantiate(parsed).config


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """{"optim.lr": 1} -> {"optim": {"lr": 1}}"""
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *path, last = name.split(".")
        branch = tree
        for part in path:
            branch[part] = branch.get(part) or {}
            branch = branch[part]
        branch[last] = value
    return tree


def explain(message: str, options: Mapping[str, Option], values: Mapping[str, Any]) -> str:
    """One line out of jsonargparse's many: the option, what it takes, what came."""
    keys = re.findall(r'Parser key "([^"]+)"', message)
    name = ".".join(keys).removeprefix("config.")
    if name not in options or name not in values:
        return " ".join(message.split())
    got = values[name]
    words = isinstance(got, list) and all(isinstance(word, str) for word in got)
    return f"{name}: expected {type_name(options[name].kind)}, got {' '.join(got) if words else repr(got)}"


def template(options: Mapping[str, Option], values: Mapping[str, Any]) -> str:
    """All settings as YAML while required ones are missing: those are null."""
    tree = {option.name: None if option.default is MISSING else option.default for option in undecided(options, values)}
    for name, value in values.items():
        is_yaml = isinstance(value, str) and not options[name].is_text
        tree[name] = settings.parse_yaml(value, name) if is_yaml else value
    return settings.to_yaml(nested({name: tree[name] for name in options if name in tree}))
