"""How are the settings of a run read from YAML, found by name, and written back?

Presets are the files `configs/<kind>/<name>.yaml`. They lie beside the package in the repository and inside it in an
installed wheel, where the build copies them.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader

MOST_VALUES = 100_000  # of a file; more is mostly one whose parts hold each other
_PACKAGE = Path(__file__).resolve().parent
_INSTALLED = _PACKAGE / "configs"
CONFIGS = _INSTALLED if _INSTALLED.is_dir() else _PACKAGE.parent / "configs"


def read_mapping(path: Path) -> dict[str, Any]:
    """The settings in a YAML file, which must hold `key: value` lines at its top. 3e-4 is a number, as in YAML 1.2."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        twice = _given_twice(yaml.compose(text, yaml.SafeLoader))
        settings = get_loader("yaml")(text)
    except RecursionError:
        most = f"over {MOST_VALUES:,} values, or nested too deeply or in itself"
        raise ValueError(f"{path}: not valid settings: {most}") from None
    except (yaml.YAMLError, ValueError) as error:  # the latter: not UTF-8, or a number of 5,000 digits
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else str(path)
        what = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ValueError(f"{where}: not valid YAML: {what}") from None
    if twice:
        raise ValueError(f"{path}, line {twice.start_mark.line + 1}: {twice.value} is given twice")
    if settings is None:
        return {}
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise ValueError(f"{path}: expected `key: value` lines, got {type(settings).__name__}")
    return settings


def _given_twice(settings: yaml.Node | None) -> yaml.Node | None:
    """A key that a mapping has twice, of which YAML would keep the last in silence. RecursionError: there is no end."""
    waiting = [settings]
    for _ in range(MOST_VALUES):
        if not waiting:
            return None
        node = waiting.pop()
        if isinstance(node, yaml.MappingNode):
            known = set[str]()
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode):
                    if key.value in known:
                        return key
                    known.add(key.value)
                waiting.append(value)
        elif isinstance(node, yaml.SequenceNode):
            waiting += node.value
    raise RecursionError


def check_seed(seed: int, name: str = "seed") -> None:
    if not 0 <= seed < 2**63:
        raise ValueError(f"{name} must be from 0 to 2**63 - 1, got {seed}")


def preset_names(kind: str) -> list[str]:
    """Names of the presets of a kind, nano-5m before nano-20m; empty for a kind without any."""
    return sorted((path.stem for path in (CONFIGS / kind).glob("*.yaml")), key=lambda name: (len(name), name))


def find_preset(kind: str, name: str) -> Path:
    """The file of a preset; `name` is the preset's name or the path of a YAML file."""
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    names = preset_names(kind)
    if name in names:
        return CONFIGS / kind / f"{name}.yaml"
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]}? Known" if near else "known"
    raise ValueError(f"no {kind} preset is called {name!r}; {hint}: {', '.join(names) or 'none'}; or give a .yaml file")


def load_preset(kind: str, name: str) -> dict[str, Any]:
    """The settings of a preset, by its name or by the path of a YAML file."""
    return read_mapping(find_preset(kind, name))


def to_yaml(config: Any) -> str:
    """A config (a dataclass or a mapping) as YAML that reads back as the same config."""
    return yaml.safe_dump(_plain(config), sort_keys=False, allow_unicode=True, width=120)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value.as_posix() if isinstance(value, Path) else value
