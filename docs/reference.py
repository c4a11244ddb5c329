"""Generate the reference: one page per verb and one for all, from the code alone.

Options, types, defaults and descriptions are those of `nanollm VERB --help`: the fields of each stage's frozen Config,
read by nanollm/config.py. The same names, nested at their dots, are the keys of the YAML files.
"""

import html
import importlib
import inspect
import io
import json
import re
import tempfile
import types
from argparse import Action
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stdout
from dataclasses import is_dataclass
from functools import partial
from pathlib import Path

from jsonargparse import SUPPRESS, Unset

import nanollm
from nanollm import cli
from nanollm.config import CONFIGS, Kinds, kinds_of, parse_options, parser_of, preset_names
from nanollm.sources.datasets import chats
from nanollm.sources.files import BadRecord, read_texts

ALSO = ("help", "config", "print_config", "dry_run")  # options that have no key in a YAML file
CODE = re.compile(r"(`[^`]+`)")
SPECIAL = re.compile(r"([\\*_|{}\[\]#])")


def pages() -> dict[str, str]:
    """File name -> Markdown, of index.md and of each verb."""
    return {"index.md": index()} | {f"{verb}.md": page_of(verb) for verb in cli.all_verbs()}


def index() -> str:
    lines = ["# Reference", "", "Written by the code, at every build of these pages.", "", "## Verbs", ""]
    for title, verbs in cli.VERBS.items():
        lines += [f"**{title}**", ""]
        lines += [f"- [`nanollm {verb}`]({verb}.md): {cell(summary)}" for verb, summary in verbs.items()]
        lines.append("")
    lines += ["## Options of every verb", "", *table(common_options())]
    lines += ["", "## Exit codes", "", exit_codes(), "", "## Python", "", cell(paragraphs(nanollm)[1]), ""]
    for name, home in sorted(nanollm._HOMES.items()):
        lines += described(name, getattr(importlib.import_module(home), name))
    return "\n".join(lines)


TALK = '[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]'
CALL = '[{"role": "user", "content": "Hi"}, {"role": "assistant", "tool_calls": [{"name": "f"}]}]'
PICTURE = '[{"role": "user", "content": [{"type": "image_url"}]}, {"role": "assistant", "content": "A cat"}]'
RECORDS = (  # what stands in a file of this ending
    (".txt", "Once upon a time"),
    (".jsonl", '{"text": "Once upon a time"}'),
    (".json", '[{"text": "Once"}, {"text": "upon"}]'),
    (".csv", "id,text\n1,Once"),
    (".jsonl", f'{{"messages": {TALK}}}'),
    (".jsonl", '{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}'),
    (".jsonl", '{"instruction": "Greet", "input": "", "output": "Hello"}'),
    (".jsonl", f'{{"messages": {CALL}}}'),
    (".jsonl", f'{{"messages": {PICTURE}}}'),
    (".jsonl", '{"messages": [{"role": "assistant", "content": "Hello"}]}'),
    (".jsonl", '{"text": null}'),
    (".jsonl", '{"text": 5}'),
    (".jsonl", '{"text": " "}'),
    (".jsonl", '{"text": "\\ud800"}'),
    (".jsonl", '{"text": "Once'),
    (".jsonl", "Once upon a time"),
    (".csv", "id,text\n1,Once,upon"),
    (".csv", 'id,text\n1,"Once\n2,upon'),
    (".txt", "Größe".encode("latin-1")),
    (".txt", "Once".encode("utf-16")),
    (".jsonl.gz", b"no gzip"),
    (".parquet", b"no Parquet"),
    (".txt", ""),
)


def forms() -> str:
    """The table of docs/howto/own-data.md: what each way in makes of small files."""
    lines = ["| ending | content | `tokenizer`, `preprocess text` | `preprocess chat` |", "|---|---|---|---|"]
    doors = (partial(read_texts, text_column="text"), chats)
    with tempfile.TemporaryDirectory() as folder:
        for ending, content in RECORDS:
            file = Path(folder, f"in{ending}")
            file.write_bytes(content.encode() if isinstance(content, str) else content)
            shown = content if isinstance(content, str) else repr(content)[1:].strip("'")
            shown = f"`{shown}`".replace("\n", "` `").replace("|", r"\|") if shown else "nothing"
            lines.append(f"| `{ending}` | {shown} | {' | '.join(outcome(door, file) for door in doors)} |")
    return "\n".join(lines)


def outcome(door: Callable[..., Iterable[object]], file: Path) -> str:
    """How many records were kept, and why the others were not."""
    bad: list[BadRecord] = []
    kept = len(list(door([file], on_bad=bad.append)))
    return "; ".join([f"**read**, {kept}"] * bool(kept) + list(dict.fromkeys(cell(each.reason) for each in bad)))


def page_of(verb: str) -> str:
    """A verb: description, options by group, all of them as YAML, and the configs that come with it."""
    stage = importlib.import_module(cli.module_of(verb))
    kinds = kinds_of(stage)
    parser = parser_of(verb, stage, kinds)
    lines = [f"# nanollm {verb}", "", *map(cell, blank_between(paragraphs(stage.Config)))]
    lines += ["", "```", parser.usage or "", "```", ""]
    if positional := getattr(stage, "POSITIONAL", ()):
        lines += [" ".join(f"`{name.upper()}` is `--{name}` without its name." for name in positional), ""]
    if "dry_run" in kinds:
        lines += ["With `--dry_run` it says what it would do, and stops.", ""]
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.dest not in ALSO]
        if actions and is_dataclass(kinds[actions[0].dest]):
            lines += [f"## {actions[0].dest}", "", f"{cell(group.title or '')}.", ""]
        elif actions:
            lines += ["## Options", ""]
        lines += [*table(actions, kinds), ""] if actions else []
    lines += ["## As YAML", "", "For `--config FILE`; what has no default is left out.", ""]
    lines += ["```yaml", defaults(verb, stage).rstrip(), "```", "", *runs_of(verb)]
    return "\n".join(lines)


def table(actions: list[Action], kinds: Kinds | None = None) -> list[str]:
    rows = [
        f"| `--{each.dest}` | {value_of(each)} | {default_of(each)} | {meaning_of(each, kinds)} |" for each in actions
    ]
    return ["| option | value | default | |", "|---|---|---|---|", *rows]


def value_of(action: Action) -> str:
    """The value to type; choices are separate so that a narrow column can break between them."""
    if not action.metavar or action.nargs == 0:
        return ""
    return r" \| ".join(f"`{choice}`" for choice in str(action.metavar).strip("[]").split("|"))


def default_of(action: Action) -> str:
    if action.required:
        return "of the preset" if preset_names(action.dest.partition(".")[0]) else "required"
    if action.default in (SUPPRESS, Unset):
        return ""
    value = action.default
    return f"`{value if isinstance(value, str | Path) else json.dumps(value)}`"


def meaning_of(action: Action, kinds: Kinds | None) -> str:
    if kinds and is_dataclass(kinds[action.dest]):
        return "all of the settings below at once, from a YAML file" + (
            " or by a preset's name" if preset_names(action.dest) else ""
        )
    return cell(action.help or "")


def common_options() -> list[Action]:
    """The options of ALSO, as described by the parser of a verb that has them all."""
    stage = importlib.import_module(cli.module_of("pretrain"))
    parser = parser_of("pretrain", stage, kinds_of(stage))
    return [action for action in parser._actions if action.dest in ALSO]


def defaults(verb: str, stage: types.ModuleType) -> str:
    """What --print_config prints."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        try:
            parse_options(verb, stage, ["--print_config"])
        except SystemExit:
            return printed.getvalue()
    raise AssertionError("--print_config did not end")


def runs_of(verb: str) -> Iterator[str]:
    """The files of configs/VERB with the comments at their tops."""
    files = sorted((CONFIGS / verb).glob("*.yaml"))
    if files:
        yield from ("## Runs that come with it", "")
    for file in files:
        yield from (f"`configs/{verb}/{file.name}`", "", "```", *head_of(file), "```", "")


def head_of(file: Path) -> Iterator[str]:
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            return
        yield line.removeprefix("#").removeprefix(" ")


def exit_codes() -> str:
    """The exit codes as nanollm/cli.py documents them."""
    told = next(part for part in paragraphs(cli) if "Exit codes: " in part)
    return cell(told.partition("Exit codes: ")[2])


def described(name: str, thing: object) -> Iterator[str]:
    """A name of `import nanollm`: signature, docstring and public methods."""
    yield from (f"### nanollm.{name}", "", "```python", f"{name}{signature(thing)}", "```", "")
    yield from map(cell, blank_between(paragraphs(thing)))
    yield ""
    if isinstance(thing, type):
        for method, function in vars(thing).items():
            function = getattr(function, "__func__", function)  # of a classmethod
            if not method.startswith("_") and inspect.isfunction(function) and function.__doc__:
                yield f"- `{method}{signature(function)}`: {cell(paragraphs(function)[0])}"
        yield ""


def signature(thing: object) -> str:
    """Parameters and return type, types without their modules."""
    text = re.sub(r"\b(?:[A-Za-z_]\w*\.)+", "", str(inspect.signature(thing)))  # type: ignore[arg-type]
    return re.sub(r"(-> |: )'(\w+)'", r"\1\2", text)


def paragraphs(thing: object) -> list[str]:
    """The paragraphs of a docstring, each on one line."""
    return [" ".join(part.split()) for part in inspect.cleandoc(thing.__doc__ or "").split("\n\n")]


def blank_between(parts: list[str]) -> list[str]:
    return [line for part in parts for line in (part, "")][:-1]


def cell(text: str) -> str:
    """Text from the code, escaped for Markdown and tables; only `code` keeps its meaning."""
    parts = CODE.split(" ".join(text.split()))
    return "".join(part if part[:1] == "`" else SPECIAL.sub(r"\\\1", html.escape(part, quote=False)) for part in parts)
