"""How is a verb explained to someone who has not used it?"""

import inspect
import shlex
import shutil
import textwrap
import types
import typing
from collections.abc import Mapping
from typing import Any

from nanollm import settings
from nanollm.options import MISSING, Option, alternatives, type_name


def help_text(
    verb: str, config: type, options: Mapping[str, Option], positional: tuple[str, ...], switches: Mapping[str, str]
) -> str:
    """What `nanollm VERB --help` prints: positionals, options by group, and the switches of every verb."""
    about = inspect.cleandoc(config.__doc__ or "").partition("\n\n")[0].replace("\n", " ")
    usage = " ".join(["nanollm", verb, *(name.upper() for name in positional), "[--option value ...]"])
    sections: dict[str, list[str]] = {"": ["Options"]}
    for option in options.values():
        group = option.name.rpartition(".")[0]
        if option.is_group:
            sections[option.name] = [f"{option.name}: {option.doc}".rstrip(": ")]
            if names := settings.preset_names(option.name):
                typed = option.name.upper() if option.name in positional else f"--{option.name} NAME"
                sections[option.name] += entry(typed, f"{', '.join(names)}, or a YAML file")
        else:
            text = described(option, from_preset=bool(settings.preset_names(group)) if group else False)
            sections[group] += entry(written(option, positional), text)
    common = entry("--config FILE", "Read settings from a YAML file; options given here win over it.")
    for name, doc in switches.items():
        common += entry(f"--{name}", doc)
    blocks = ["\n".join(lines) for lines in sections.values() if len(lines) > 1]
    return "\n\n".join(
        [f"usage: {usage}", textwrap.fill(about, help_width()), *blocks, "\n".join(["Every verb", *common])]
    )


def written(option: Option, positional: tuple[str, ...]) -> str:
    """An option as it is typed."""
    if option.name in positional:
        return option.name.upper()
    if option.is_flag:
        return f"--{option.name}" if option.default is False else f"--{option.name} true|false"
    return f"--{option.name} {placeholder(option.kind)}"


def placeholder(kind: Any) -> str:
    """What stands for a value in the help: INT, PATH ..., NAME (one of several words)."""
    if typing.get_origin(kind) in (list, tuple):
        return f"{placeholder(typing.get_args(kind)[0])} ..."
    if len(alternatives(kind)) > 1:
        return "|".join(placeholder(member) for member in alternatives(kind) if member is not types.NoneType)
    return "NAME" if choices(kind) else type_name(kind).upper()


def described(option: Option, from_preset: bool) -> str:
    """What an option means, its choices and its default."""
    names = choices(option.kind)
    facts = [f"NAME is one of {', '.join(names)}" if len(names) > 1 else f"NAME is {names[0]}"] if names else []
    if option.default is not MISSING:
        facts.append(f"default: {shown(option.default)}")
    elif not from_preset:
        facts.append("required")
    return f"{option.doc} ({'; '.join(facts)})".strip() if facts else option.doc


def choices(kind: Any) -> list[str]:
    """The words a type allows, those inside a list or a union too."""
    if typing.get_origin(kind) is typing.Literal:
        return [str(name) for name in typing.get_args(kind)]
    return [name for member in typing.get_args(kind) for name in choices(member)]


def shown(default: Any) -> str:
    if default is None or default == [] or default == () or default == "":
        return "none"
    if isinstance(default, list | tuple):
        return shlex.join(map(str, default))
    return str(default).lower() if isinstance(default, bool) else str(default)


def entry(left: str, right: str) -> list[str]:
    """One option of the help, its words in a column of their own."""
    lines = textwrap.wrap(right, help_width() - 30)
    head = [f"  {left:<26}  {lines[0]}"] if len(left) <= 26 else [f"  {left}", f"{'':30}{lines[0]}"]
    return [*head, *(f"{'':30}{line}" for line in lines[1:])]


def help_width() -> int:
    return min(max(shutil.get_terminal_size().columns, 80), 120)
