"""YAML, presets and options: how a file and the words of a command line become the frozen Config of a stage.

jsonargparse does it: types, nesting, help, --print_config. It gets two mappings: --config with its presets, and above
that the command line. Here is what it lacks: the forms that people type, presets by name, mistakes in one line. Presets
are the files `configs/<kind>/<name>.yaml`; the build copies them into an installed wheel.
"""

import argparse
import dataclasses
import difflib
import inspect
import os
import re
import types
import typing
from argparse import SUPPRESS
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser  # elsewhere imported late: it takes a third of a second

SWITCHES = {"help": "--help", "print_config": "--print_config=skip_unset", "dry_run": "--dry_run"}
MAX_DIGITS = 18  # of a whole number: what 64 bits hold in any case

_PACKAGE = Path(__file__).resolve().parent
CONFIGS = inside if (inside := _PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs"

Kinds = Mapping[str, Any]  # dotted name of an option -> type of its value


# --- YAML and presets ---


class Loader(yaml.SafeLoader):
    """YAML with the numbers of YAML 1.2 (3e-4), without dates. No key counts twice, and nothing stands for a copy."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in pairs if not tag.endswith(":timestamp")]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):  # a few lines of copies of copies would be millions of values
            raise yaml.MarkedYAMLError(problem="*copies are not read; write them out", problem_mark=self.get_mark())
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        first = {key.value: key for key in reversed(keys)}
        if twice := [key for key in keys if first[key.value] is not key]:
            raise yaml.MarkedYAMLError(problem=f"{twice[0].value} is given twice", problem_mark=twice[0].start_mark)
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """Quotes every text that Loader, or YAML 1.1, would take for something else."""


for each in (Loader, Dumper):
    each.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )


class TextLoader(Loader):
    """The same, but every value stays the text that was written: whether `no` is a truth value the option decides."""


TextLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if tag.endswith((":null", ":merge"))]
    for first, pairs in Loader.yaml_implicit_resolvers.items()
}


def read_mapping(path: Path, loader: type[yaml.SafeLoader] = Loader) -> dict[str, Any]:
    """The settings in a YAML file, which must hold `key: value` lines at its top."""
    try:
        settings = loader(path.read_text(encoding="utf-8-sig")).get_single_data()
    except RecursionError:
        raise ValueError(f"{path}: not valid YAML: nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:  # the latter: not UTF-8, or a number of 5,000 digits
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else str(path)
        what = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ValueError(f"{where}: not valid YAML: {what}") from None
    if settings is None:
        return {}
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise ValueError(f"{path}: expected `key: value` lines, got {type(settings).__name__}")
    return settings


def to_yaml(config: Any) -> str:
    """A config (a dataclass or a mapping) as YAML that reads back as the same config."""
    return yaml.dump(plain(config), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)


def plain(value: Any) -> Any:
    """A config's values as YAML has them: mappings, lists, and paths as text."""
    if is_dataclass(value):
        value = vars(value)
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return value.as_posix() if isinstance(value, Path) else value


def preset_names(kind: str) -> list[str]:
    """Names of the presets of a kind, nano-5m before nano-20m; empty for a kind without any."""
    return sorted((path.stem for path in (CONFIGS / kind).glob("*.yaml")), key=lambda name: (len(name), name))


def load_preset(kind: str, name: str, loader: type[yaml.SafeLoader] = Loader) -> dict[str, Any]:
    """The settings of a preset, by its name or by the path of a YAML file."""
    if name.endswith((".yaml", ".yml")):
        return read_mapping(Path(name).expanduser(), loader)
    if name in (names := preset_names(kind)):
        return read_mapping(CONFIGS / kind / f"{name}.yaml", loader)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]}? Known" if near else "known"
    raise ValueError(f"no {kind} preset is called {name!r}; {hint}: {', '.join(names) or 'none'}; or give a .yaml file")


def did_you_mean(word: str, known: Sequence[str], otherwise: str) -> str:
    """A hint at the nearest of the known words; `otherwise`, where none is near."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]}?" if near else otherwise


def check_at_least(least: int, config: object, *names: str, prefix: str = "") -> None:
    """ValueError for an option that is given (not None) and below its least value."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < least:
            raise ValueError(f"{prefix}{name} must be at least {least}, got {value}")


def check_seed(seed: int, name: str = "seed") -> None:
    if not 0 <= seed < 2**63:
        raise ValueError(f"{name} must be from 0 to 2**63 - 1, got {seed}")


# --- options ---


def parse_options(verb: str, stage: types.ModuleType, words: Sequence[str]) -> tuple[Any, bool]:
    """The Config of a stage, and whether --dry_run was given. --help and --print_config end in SystemExit.

    A stage with a function `within` chooses by --budget what was not given, which wins.
    """
    kinds = kinds_of(stage)
    above = sort_words(words, kinds, getattr(stage, "POSITIONAL", ()))
    switches = [option for name, option in SWITCHES.items() if above.pop(name, None)]
    below = read_mapping(Path(above.pop("config")).expanduser(), TextLoader) if "config" in above else {}
    below |= {name: above.pop(name) for name in list(above) if is_dataclass(kinds[name])}
    for name, value in below.items():
        if is_dataclass(kinds.get(name)) and not isinstance(value, dict) and str(value)[:1] != "{":
            below[name] = load_preset(name, str(value), TextLoader)
        elif is_sequence(kinds.get(name)) and isinstance(value, str) and not is_null(value, kinds[name]):
            below[name] = [value]  # jsonargparse would take it for a file that lists the values
    parser = parser_of(verb, stage, kinds)

    def parse(chosen: Mapping[str, Any], *switches: str) -> tuple[Any, bool]:
        settings = [to_yaml(as_meant(given, kinds)) for given in (chosen, below, above)]
        try:
            parsed = parser.parse_args([*(f"--config={each}" for each in settings), *switches])
        except argparse.ArgumentError as error:
            raise ValueError(explain(str(error), kinds)) from None
        values = parser.instantiate(parsed)
        config = stage.Config(**{field.name: values[field.name] for field in dataclasses.fields(stage.Config)})
        return config, "dry_run" in parsed

    chosen = {}
    if hasattr(stage, "within") and SWITCHES["help"] not in switches:
        budget = [layer.pop("budget") for layer in (above, below) if "budget" in layer]
        if budget and budget[0] not in (None, "null"):
            chosen = stage.within(budget[0], below | above, lambda given: parse(given)[0])
    return parse(chosen, *switches)


def load_config(kind: str, name: str, cls: type[Any]) -> Any:
    """A preset, or the YAML file of one, as its dataclass; refused in the words that an option would be."""
    stage = types.ModuleType(kind)
    vars(stage)["Config"] = dataclasses.make_dataclass("Config", [(kind, cls)], frozen=True, kw_only=True)
    config, _ = parse_options(kind, stage, [f"--{kind}={name}"])
    return getattr(config, kind)


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
        if isinstance(value, list) and len(value) == 1 and is_null(value[0], kinds[name]):
            given[name] = "null"
        if kinds[name] is bool and value.lower() not in ("true", "false"):  # in `--json DIR`, DIR is not for --json
            given[name], extra = "true", [value, *extra]
    if odd := [word for word in extra if word.startswith("--")]:
        raise ValueError(unknown(odd[0].partition("=")[0], kinds))
    if odd := extra[len(positional) :]:
        raise ValueError(f"did not expect {odd[0]!r} here; options start with --")
    if sum(word.partition("=")[0] == "--config" for word in words) > 1:
        raise ValueError("--config was given twice; put the settings into one file")
    return given | dict(zip(positional, extra, strict=False))


def as_meant(given: Any, kinds: Kinds, name: str = "") -> Any:
    """Settings, all of them texts, in the forms that jsonargparse reads as people mean them.

    ~ is the home folder, 1e3 a whole number, and no or false the "off" of an option that can be on. Refused are paths
    of no letter, and whole numbers that are endless.
    """
    if isinstance(given, dict):
        return {key: as_meant(value, kinds, f"{name}.{key}".lstrip(".")) for key, value in given.items()}
    if isinstance(given, list):
        return [as_meant(value, kinds, name) for value in given]
    kind = notation(kinds.get(name) or kinds.get(name.rpartition(".")[0]) or str)  # the latter: of a mapping
    if not isinstance(given, str):
        return given
    if "path" in kind:
        if given == "":
            raise ValueError(f"{name}: expected a path, got an empty text")
        if given.startswith("~") and (home := os.path.expanduser(given)) == given:  # noqa: PTH111
            raise ValueError(
                f"{name}: {given.partition('/')[0]} is nobody's home folder here; write ./{given} if meant"
            )
        return home if given.startswith("~") else given
    if {"on", "off"} <= {*kind.split("|")}:
        return {"true": "on", "yes": "on", "false": "off", "no": "off"}.get(given.lower(), given)
    if re.search(r"\b(int|float)\b", kind):
        if re.fullmatch(rf"[-+]?\d{{{MAX_DIGITS + 1},}}", given):
            raise ValueError(f"{name}: expected {kind}, got a number of {len(given)} digits")
        is_short = re.fullmatch(r"[-+]?\d{1,3}(\.\d{0,17})?[eE]\+?\d{1,2}", given)
        if is_short and "float" not in kind and (number := Decimal(given)) == int(number) < 10**MAX_DIGITS:
            return str(int(number))
    return given


def is_sequence(kind: Any) -> bool:
    """Whether an option of this type takes several words; one that may also be null does too."""
    is_union = typing.get_origin(kind) in (types.UnionType, typing.Union)
    return typing.get_origin(kind) in (list, tuple) or (is_union and any(map(is_sequence, typing.get_args(kind))))


def is_null(given: Any, kind: Any) -> bool:
    return given == "null" and "null" in notation(kind).split("|")


def parser_of(verb: str, stage: types.ModuleType, kinds: Kinds) -> "ArgumentParser":
    from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings
    from jsonargparse.typing import register_type

    class Help(DefaultHelpFormatter):
        """jsonargparse's help, where the placeholders alone say what to type."""

        def _get_type_str(self, action: argparse.Action) -> None:
            return None

        def _get_help_string(self, action: argparse.Action) -> str:
            text = super()._get_help_string(action).replace("required, default: %(default)s", "required")
            return text.removesuffix(" (required)") if preset_names(action.dest.partition(".")[0]) else text

    # The sentinel tells a field without a value from one that is null, so that null is refused where it makes no sense.
    set_parsing_settings(docstring_parse_attribute_docstrings=True, unset_sentinel=True)
    register_type(Path, os.fspath, Path, type_check=isinstance)  # str, which it would take, makes a text of null
    usage = " ".join(["nanollm", verb, *map(str.upper, getattr(stage, "POSITIONAL", ())), "[--option value ...]"])
    about = inspect.cleandoc(stage.Config.__doc__).partition("\n\n")[0]
    parser = ArgumentParser(usage=usage, description=about, exit_on_error=False, formatter_class=Help)
    parser.add_argument("--config", action="config", help="YAML file of settings; options given here win over it.")
    if "dry_run" in kinds:
        parser.add_argument(
            "--dry_run", action="store_true", default=SUPPRESS, help="Print what would be done, then exit."
        )
    parser.add_class_arguments(stage.Config, None, as_group=False)
    for action in parser._actions:
        kind = kinds[action.dest]
        action.metavar = f"[{notation(kind)}]" if kind is bool else notation(kind, action.dest)
        action.option_strings = [word for word in action.option_strings if not word.endswith("+")]
        if action.dest == "print_config":
            action.metavar, action.help = "", "Print all settings as YAML, usable with --config, then exit."
    return parser


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
