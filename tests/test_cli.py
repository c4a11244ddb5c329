"""What a user gets for the right words, and learns from the wrong ones."""

import dataclasses
import functools
import importlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import torch

import nanollm
from nanollm import __version__, cli
from nanollm.config import CONFIGS, kinds_of, load_preset, parse_options, read_mapping, to_yaml
from nanollm.model.config import ModelConfig
from nanollm.stages import grpo, pretrain


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A shape."""

    width: int
    """Numbers per token."""
    depth: int = 2
    """Blocks."""

    def __post_init__(self) -> None:
        if self.width % 2:
            raise ValueError(f"shape.width must be even, got {self.width}")


@dataclass(frozen=True, kw_only=True)
class Optim:
    """How weights move."""

    lr: float = 3e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the moments."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Build a toy.

    For tests only.
    """

    kind: Literal["owt", "sni"]
    """Which source."""
    shape: Shape
    """The model's shape."""
    out: Path
    """Folder to write."""
    optim: Optim = field(default_factory=lambda: Optim(lr=0.5))
    """The optimizer."""
    inputs: list[Path] = field(default_factory=list)
    """Files or folders."""
    limit: int | None = None
    """Most documents; null: all."""
    stop: list[str] = field(default_factory=list)
    """Texts to stop at."""
    prompt: str = ""
    """Text to start with."""
    workers: int | Literal["auto"] = "auto"
    """Processes."""
    fuse: Literal["auto", "on", "off"] = "auto"
    """Whether to fuse."""
    json: bool = False
    """Print JSON."""


REQUIRED = ["--shape", "small", "--out", "somewhere"]


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """A verb `toy` whose run returns its config; presets small and small-wide. Replace run or plan as needed."""
    stage = types.ModuleType("nanollm.stages.toy")
    stage.Config, stage.POSITIONAL, stage.run = Config, ("kind",), lambda config: seen.append(config)
    stage.seen = seen = []
    monkeypatch.setitem(sys.modules, "nanollm.stages.toy", stage)
    monkeypatch.setitem(cli.VERBS["Use"], "toy", "build a toy")
    monkeypatch.setitem(Shape.__post_init__.__globals__, "__name__", "nanollm.toy")  # as if it were ours
    presets = tmp_path / "configs" / "shape"
    presets.mkdir(parents=True)
    (presets / "small.yaml").write_text("width: 4\n")
    (presets / "small-wide.yaml").write_text("width: 8\ndepth: 3\n")
    monkeypatch.setattr("nanollm.config.CONFIGS", tmp_path / "configs")
    return stage


@pytest.fixture(scope="module")
def completion():
    """The script that completes commands in a shell."""
    return functools.cache(lambda shell: cli.completion([shell]))


@pytest.fixture
def config_of(toy):
    """The Config that the words of a command line become."""

    def parse(*words):
        assert cli.main(["toy", *map(str, words)]) == 0
        return toy.seen[-1]

    return parse


@pytest.fixture
def complaint(toy, capsys):
    """The one line that a mistake gives."""

    def make(*words):
        assert cli.main(["toy", *map(str, words)]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.count("\n") == 1
        assert said.err.startswith("nanollm toy: ")
        return said.err.removeprefix("nanollm toy: ").rstrip()

    return make


# Without a verb


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from nanollm.cli import main; main(['--help'])\n"
        "heavy = {'torch', 'jsonargparse', 'rich', 'numpy', 'yaml', 'dataclasses'} & sys.modules.keys()\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(verb in done.stdout for verb in cli.all_verbs())


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pipes that break")
def test_a_reader_that_goes_away_leaves_no_traceback():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "nanollm"], stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_every_listed_verb_is_a_stage_and_every_stage_is_listed():
    stages = {file.stem for file in (Path(cli.__file__).parent / "stages").glob("*.py")} - {"__init__"}
    assert {f"nanollm.stages.{stage}" for stage in stages} == {*map(cli.module_of, cli.all_verbs())}


@pytest.mark.parametrize("verb", cli.all_verbs())
def test_every_verb_explains_every_option(verb, capsys):
    stage = importlib.import_module(cli.module_of(verb))
    assert cli.main([verb, "--help"]) == 0
    text = capsys.readouterr().out
    assert " ".join(text.split()).startswith(f"usage: nanollm {verb} ")
    assert not re.search(r"typing\.|<class|Literal|Unset|None\b(?!:)|ITEM|LIST_OF|FILE_OR_CLASS", text)
    for name in kinds_of(stage):
        assert re.search(rf"  --{name}( .*)?\n? {{2,}}\S", text) or name == "help", f"{verb}: {name} has no docstring"


def test_the_version_says_what_it_runs_on_and_imports_nothing_heavy():
    code = "import sys; from nanollm.cli import main; main(['--version']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    python = ".".join(map(str, sys.version_info[:3]))
    assert (
        done.stdout
        == f"nanollm {__version__} (Python {python}, torch {torch.__version__}, {platform.platform(terse=True)})\n"
    )


# In a shell


def test_a_shell_is_told_every_option_of_every_verb(completion):
    told = dict(re.findall(r"^_shtab_nanollm_(\w+)_option_strings=\((.*)\)$", completion("bash"), re.MULTILINE))
    options_of = {verb: kinds_of(importlib.import_module(cli.module_of(verb))) for verb in cli.all_verbs()}
    assert {verb: set(words.split()) - {"-h"} for verb, words in told.items()} == {
        verb: {f"--{name}" for name in kinds} for verb, kinds in options_of.items()
    }


COMPLETED = {
    "nanollm pre": ["preprocess", "pretrain", "prefer"],
    "nanollm preprocess --kind ": ["owt", "sni", "gsm8k", "words", "text", "chat"],
    "nanollm pretrain --optim.lr": ["--optim.lr"],
    "nanollm pretrain --model nano-5m --parallel ": ["ddp", "fsdp", "hsdp"],
    "nanollm generate runs/a --quant": ["--quantize"],
    "nanollm pretrain --data my_b": ["my_bundle"],
    "nanollm pretrain --config my_c": ["my_config.yaml"],
    "nanollm generate --chat ": ["true", "false"],
    "nanollm --vers": ["--version"],
}
"""What is typed before TAB, and what the shell then offers."""

ASK_BASH = """
source ./completion
while IFS= read -r line; do
    read -ra COMP_WORDS <<< "$line"
    [[ $line == *" " ]] && COMP_WORDS+=("")
    COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
    _shtab_nanollm
    echo "${COMPREPLY[*]}"
done
"""


def test_a_shell_completes_verbs_options_their_words_and_files(completion, tmp_path):
    if shutil.which("bash") is None or os.name == "nt":
        pytest.skip("there is no bash here: apt-get install bash")
    (tmp_path / "my_bundle").mkdir()
    (tmp_path / "my_config.yaml").touch()
    (tmp_path / "completion").write_text(completion("bash"))
    typed = "".join(f"{line}\n" for line in COMPLETED)
    told = subprocess.check_output(["bash", "-c", ASK_BASH], input=typed, cwd=tmp_path, text=True)
    offered = [[word.rstrip("/") for word in answer.split()] for answer in told.splitlines()]
    assert dict(zip(COMPLETED, offered, strict=True)) == COMPLETED
    assert "#compdef nanollm" in completion("zsh")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pretran"], "unknown verb 'pretran'; did you mean pretrain?"),
        (["--completion"], "--completion expects one of bash, zsh, fish, powershell, got none"),
        (["--completion", "bash", "zsh"], "--completion expects one of bash, zsh, fish, powershell, got bash zsh"),
    ],
)
def test_a_mistake_before_any_verb_is_one_line(capsys, words, said):
    assert cli.main(words) == 2
    assert capsys.readouterr().err == f"nanollm: {said}\n"


# From words to a Config


OWT = ["owt", *REQUIRED]
SNI = "kind: sni\nshape: small-wide\nout: there\n"
FORMS = [
    # words, what stands in the file of --config, and what the Config then says
    (["--optim.lr", "2e-3"], SNI + "optim: {lr: 1e-3, betas: [0.8, 0.9]}", {"optim": Optim(lr=2e-3, betas=(0.8, 0.9))}),
    ([], SNI, {"kind": "sni", "out": Path("there"), "shape": Shape(width=8, depth=3), "optim": Optim(lr=0.5)}),
    ([*OWT, "--optim.betas", "0", "1"], "", {"optim": Optim(lr=0.5, betas=(0, 1))}),
    (OWT, "optim: {betas: [0, 1]}", {"optim": Optim(lr=0.5, betas=(0, 1))}),
    (["owt", "--out", "x", "--shape", "small-wide", "--shape.depth", "9"], "", {"shape": Shape(width=8, depth=9)}),
    (["owt", "--out", "x", "--shape.depth", "9", "--shape", "small-wide"], "", {"shape": Shape(width=8, depth=9)}),
    (["owt", "--out", "x", "--shape", "mine.yaml"], "", {"shape": Shape(width=12)}),
    (["owt", "--out", "x", "--shape", "{width: 14, depth: 1}"], "", {"shape": Shape(width=14, depth=1)}),
    (["--shape", "small"], SNI, {"shape": Shape(width=4)}),  # replaces the shape of the file
    (["--shape.depth", "9"], SNI, {"shape": Shape(width=8, depth=9)}),
    ([], "kind: sni\nshape: mine.yaml\nout: there\n", {"shape": Shape(width=12)}),
    (
        [*OWT, "--inputs", "a b.txt", "c", "--json"],
        "",
        {"inputs": [Path("a b.txt"), Path("c")], "json": True, "stop": []},
    ),
    (OWT, "inputs: [a, b]", {"inputs": [Path("a"), Path("b")]}),
    (OWT, "inputs: mine.yaml", {"inputs": [Path("mine.yaml")]}),  # not a list of paths
    (OWT, "inputs: []", {"inputs": []}),
    ([*OWT, "--json", "false"], "", {"json": False}),
    ([*OWT, "--json", "true"], "", {"json": True}),
    ([*REQUIRED, "--json", "owt"], "", {"json": True, "kind": "owt"}),
    (OWT, "limit: 3\noptim: {lr: 3e-4}", {"limit": 3, "optim": Optim(lr=3e-4)}),
    ([*OWT, "--limit", "null"], "limit: 3", {"limit": None}),
]


@pytest.mark.parametrize(("words", "text", "expected"), FORMS)
def test_words_a_file_and_presets_become_a_config(config_of, tmp_path, monkeypatch, words, text, expected):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("width: 12\n")
    Path("run.yaml").write_text(text)
    config = config_of(*words, *["--config", "run.yaml"] * bool(text))
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    "text", ["a: b", "{x}", "[1, 2]", "- x", "1.0", "true", "--dashes", "# Title", "~", "öß漢🙂", "'quoted'", ""]
)
def test_text_arrives_as_it_was_typed(config_of, text):
    assert config_of("owt", *REQUIRED, f"--prompt={text}").prompt == text
    assert config_of("owt", *REQUIRED, f"--stop={text}").stop == [text]


LOOKS_LIKE_A_NUMBER = [
    "1e3",
    "1E5",
    "25921e05",
    "1e-3",
    "007",
    "1_000",
    "on",
    "no",
    "null",
    "2024-01-01",
    "0x1F",
    "1:30",
]


@pytest.mark.parametrize("text", LOOKS_LIKE_A_NUMBER)
def test_text_is_text_in_a_file_too_quoted_or_not(config_of, tmp_path, text):
    file = tmp_path / "run.yaml"
    for written in (text, f'"{text}"'):
        if written == "null":  # which a file can say
            continue
        file.write_text(f"kind: owt\nshape: small\nout: {written}\nprompt: {written}\nstop: [{written}, b]\n")
        config = config_of("--config", file)
        assert (config.prompt, config.stop, config.out) == (text, [text, "b"], Path(text))
    config = config_of("owt", "--shape", "small", "--out", text, "--prompt", text, "--stop", text, "b")
    assert (config.prompt, config.stop, config.out) == (text, [text, "b"], Path(text))


@pytest.mark.parametrize(
    ("text", "value"), [("off", "off"), ("no", "off"), ("False", "off"), ("true", "on"), ("on", "on")]
)
def test_a_choice_of_on_and_off_takes_a_truth_value(config_of, tmp_path, text, value):
    file = tmp_path / "run.yaml"
    file.write_text(f"kind: owt\nfuse: {text}\n")
    assert config_of("--config", file, *REQUIRED).fuse == value
    assert config_of("owt", "--fuse", text, *REQUIRED).fuse == value


@pytest.mark.parametrize(("text", "value"), [("1e3", 1000), ("1.5e1", 15), ("2E+2", 200), ("1e0", 1)])
def test_a_whole_number_may_have_an_exponent(config_of, complaint, tmp_path, text, value):
    file = tmp_path / "run.yaml"
    file.write_text(f"kind: owt\nlimit: {text}\n")
    assert config_of("--config", file, *REQUIRED).limit == value
    assert config_of("owt", "--limit", text, *REQUIRED).limit == value
    for broken in ("1.5e0", "1e-3", "1e99"):
        assert complaint("owt", "--limit", broken, *REQUIRED).startswith("limit: expected int|null, got ")


def test_a_tilde_is_the_home_folder_in_every_path(config_of, complaint, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "run.yaml"
    file.write_text("kind: owt\nshape: ~/wide.yaml\nout: ~/x\ninputs: [~/a.txt, b~.txt]\nprompt: ~/x\n")
    (tmp_path / "wide.yaml").write_text("width: 6\n")
    config = config_of("--config=~/run.yaml")
    assert (config.out, config.inputs) == (tmp_path / "x", [tmp_path / "a.txt", Path("b~.txt")])
    assert (config.prompt, config.shape.width) == ("~/x", 6)
    assert config_of("owt", "--shape", "small", "--out=~/x").out == tmp_path / "x"
    assert complaint("owt", "--shape", "small", "--out", "~nobody-here/x").startswith(
        "out: ~nobody-here is nobody's home"
    )


def test_printed_settings_read_back_as_the_same_config(toy, config_of, capsys, tmp_path):
    words = ["owt", "--shape", "small-wide", "--out", "a/b", "--inputs", "x", "--optim.lr", "1e-7", "--prompt=no: yes"]
    assert cli.main(["toy", *words, "--print-config"]) == 0
    file = tmp_path / "run.yaml"
    file.write_text(capsys.readouterr().out)
    assert config_of("--config", file) == config_of(*words)


def test_settings_can_be_printed_before_the_required_ones_are_known(toy, config_of, capsys, tmp_path):
    assert cli.main(["toy", "--print_config", "--optim.lr", "1e-2"]) == 0
    file = tmp_path / "run.yaml"
    file.write_text(capsys.readouterr().out)
    assert read_mapping(file)["optim"]["lr"] == 1e-2
    assert "kind" not in read_mapping(file)
    assert config_of("owt", *REQUIRED, "--config", file).optim.lr == 1e-2


def test_help_shows_defaults_choices_presets_and_what_is_required(toy, capsys):
    assert cli.main(["toy", "-h"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "usage: nanollm toy KIND [--option value ...] Build a toy. options:" in text
    assert "--kind owt|sni Which source. (required)" in text
    assert "--shape small|small-wide|file.yaml" in text
    assert "--shape.width int Numbers per token. --shape.depth" in text  # a preset may give it
    assert "--optim.lr float Peak learning rate. (default: 0.5)" in text
    assert "--optim.betas float float Decay rates of the moments. (default: (0.9, 0.95))" in text
    assert "--inputs path ... Files or folders. (default: [])" in text
    assert "--workers int|auto" in text
    assert "--json [true|false]" in text
    assert "For tests only" not in text
    assert "dry_run" not in text


# Results


def test_stdout_carries_the_result_and_nothing_else(toy, capsys):
    toy.run = lambda config: config.out
    assert cli.main(["toy", "owt", *REQUIRED]) == 0
    assert capsys.readouterr() == ("somewhere\n", "")


def test_a_dry_run_prints_the_plan_and_runs_nothing(toy, capsys):
    toy.plan = lambda config: f"would write {config.out}"
    assert cli.main(["toy", "owt", *REQUIRED, "--dry_run"]) == 0
    assert capsys.readouterr().out == "would write somewhere\n"
    assert toy.seen == []


# Mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["owt", "--optim.learning_rate", "1"], "unknown option --optim.learning_rate; did you mean optim.lr?"),
        (["owt", "--lr", "1"], "unknown option --lr; did you mean optim.lr?"),
        (["owt", "--input", "a"], "unknown option --input; did you mean inputs?"),
        (["owt", "--dry_run"], "unknown option --dry_run; --help lists them all"),
        (["owt", *REQUIRED, "--optim.lr", "fast"], "optim.lr: expected float, got fast"),
        (["owt", *REQUIRED, "--optim.lr", "null"], "optim.lr: expected float, got None"),
        (["owt", *REQUIRED, "--optim.betas", "1"], "optim.betas: expected float float, got ['1']"),
        (["owt", *REQUIRED, "--workers", "1.5"], "workers: expected int|auto, got 1.5"),
        (["owt", *REQUIRED, "--limit", "x"], "limit: expected int|null, got x"),
        (["owt", *REQUIRED, "--shape.depth", "x"], "shape.depth: expected int, got x"),
        (["owt", "--out", "x", "--shape", "{width: x}"], "shape.width: expected int, got x"),
        (["web", *REQUIRED], "kind: expected owt|sni, got web"),
        (["owt", *REQUIRED, "--out"], "--out: expected one argument"),
        (["owt", "--shape", "small", "--out="], "out: expected a path, got an empty text"),
        (["owt", *REQUIRED, "more"], "did not expect 'more' here; options start with --"),
        (["owt", *REQUIRED, "--json=maybe", "owt"], "did not expect 'owt' here; options start with --"),
        (["owt", *REQUIRED, "--shape.width", "3"], "shape.width must be even, got 3"),
        (["owt"], "missing --shape small|small-wide|file.yaml, --out path"),
        (["--shape", "small", "--out", "x"], "missing --kind owt|sni"),
        (
            ["owt", "--out", "x", "--shape", "smal"],
            "no shape preset is called 'smal'; did you mean small? Known: small, small-wide; or give a .yaml file",
        ),
        (["owt", "--shape", "nope.yaml"], "No such file or directory: nope.yaml"),
        (["--config", "a.yaml", "--config=b.yaml"], "--config was given twice; put the settings into one file"),
        (["owt", "--config", "nope.yaml"], "No such file or directory: nope.yaml"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_clear_line(complaint, words, message):
    assert complaint(*words) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind: owt\noptim:\n  lrr: 1\n", "unknown option optim.lrr; did you mean optim.lr?"),
        ("kinds: owt\n", "unknown option kinds; did you mean kind?"),
        ("kind: [\n", "{file}, line 2: not valid YAML: expected the node content"),
        ("just text\n", "{file}: expected `key: value` lines, got str"),
        ("1: owt\n", "unknown option 1; "),
        ("shape: 3\n", "no shape preset is called '3'; known: small, small-wide; or give a .yaml file"),
        ("shape: null\n", "no shape preset is called 'None'; known: small, small-wide; or give a .yaml file"),
        ("shape: smal\n", "no shape preset is called 'smal'; did you mean small? Known: small, small-wide; or give"),
        ("kind: owt\nout: x\nshape: small\noptim: {lr: [1]}\n", "optim.lr: expected float, got ['1']"),
        ("kind: owt\nout: x\nshape: small\noptim: {lr: null}\n", "optim.lr: expected float, got None"),
        (b"kind: \xff\xfe\n", "{file}: not valid YAML: "),
        ("kind: owt\nkind: sni\n", "{file}, line 2: not valid YAML: kind is given twice"),
        ("optim: {lr: 9, lr: 8}\n", "{file}, line 1: not valid YAML: lr is given twice"),
        ("optim: &a [*a]\n", "{file}, line 1: not valid YAML: *copies are not read; write them out"),
        ("limit: " + "9" * 5000, "limit: expected int|null, got a number of 5000 digits"),
        ("limit: 1\0", "{file}: not valid YAML: unacceptable character"),
        ("limit: 1".encode("utf-16"), "{file}: not valid YAML: 'utf-8' codec can't decode"),
        (b"limit: 1 # \xed\xa0\x80", "{file}: not valid YAML: 'utf-8' codec can't decode"),
        ("? [1]\n: 2\n", "{file}, line 1: not valid YAML: found unhashable key"),
        ("- kind\n", "{file}: expected `key: value` lines, got list"),
    ],
)
def test_a_mistake_in_the_file_is_one_clear_line(complaint, tmp_path, text, message):
    file = tmp_path / "run.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert complaint("--config", file).startswith(message.format(file=file))


def test_the_command_line_of_a_real_verb_reads_presets_and_changes_them(capsys, tmp_path):
    file = tmp_path / "run.yaml"
    words = "--model nano-5m --model.context_length 128 --optim.lr 3e-4 --train.steps 9 --trackers tensorboard"
    paths = ["--tokenizer_path", "tok", "--data", "tokens", "--out", "run"]
    assert cli.main(["pretrain", *words.split(), *paths, "--print_config"]) == 0
    file.write_text(capsys.readouterr().out)
    config, is_dry_run = parse_options("pretrain", pretrain, ["--config", str(file), "--dry_run"])
    assert is_dry_run
    assert dataclasses.asdict(config.model) == asdict_of("nano-5m") | {"context_length": 128}
    assert (config.optim.lr, config.train.steps, config.trackers) == (3e-4, 9, ["tensorboard"])
    file.write_text(to_yaml(config))
    assert parse_options("pretrain", pretrain, ["--config", str(file)]) == (config, False)


def asdict_of(preset):
    return dataclasses.asdict(ModelConfig(**load_preset("model", preset)))


def raising(error):
    """A run that fails with this error, as if our own code had raised it."""
    scope = {"__name__": "nanollm.toy", "error": error}
    exec("def run(*words):\n    raise error", scope)
    return scope["run"]


def test_our_value_errors_and_all_os_errors_are_the_users_mistakes(toy, complaint):
    toy.run = raising(ValueError("train-0003.npy is truncated:\n  expected 8 bytes"))
    assert complaint("owt", *REQUIRED) == "train-0003.npy is truncated: expected 8 bytes"
    toy.run = raising(PermissionError(13, "Permission denied", "/locked"))
    assert complaint("owt", *REQUIRED) == "Permission denied: /locked"
    toy.run = raising(FileNotFoundError("no shards in data/owt"))
    assert complaint("owt", *REQUIRED) == "no shards in data/owt"


@pytest.mark.parametrize("run", [lambda config: json.loads("{"), raising(KeyError("x")), raising(RuntimeError("boom"))])
def test_any_other_error_is_ours_and_shows_a_traceback(toy, capsys, run):
    toy.run = run
    assert cli.main(["toy", "owt", *REQUIRED]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupted_run_exits_130_and_a_saved_one_as_it_says(toy, capsys):
    toy.run = raising(KeyboardInterrupt())
    assert cli.main(["toy", "owt", *REQUIRED]) == 130
    assert capsys.readouterr().err == "nanollm toy: interrupted\n"
    toy.run = raising(SystemExit(143))
    with pytest.raises(SystemExit, match="143"):
        cli.main(["toy", "owt", *REQUIRED])


def test_a_parser_that_gives_up_does_not_pass_for_done(toy, monkeypatch):
    monkeypatch.setattr("nanollm.config.parse_options", raising(SystemExit(2)))
    with pytest.raises(SystemExit, match="2"):
        cli.main(["toy"])
    monkeypatch.setattr("nanollm.config.parse_options", raising(SystemExit(0)))
    assert cli.main(["toy"]) == 0


def test_notebooks_find_the_names_that_the_package_offers_and_no_others():
    assert all(getattr(nanollm, name) is not None for name in dir(nanollm))
    modules = {path.stem for path in Path(nanollm.__file__).parent.iterdir()} - {"__init__"}
    assert modules & set(dir(nanollm)) == set()  # a module would take the place of the name
    with pytest.raises(AttributeError, match="it offers load"):
        nanollm.__getattr__("Trainer")


@pytest.mark.parametrize(("world", "rank", "speaks"), [("2", "1", False), ("2", "0", True), ("1", "1", True)])
def test_of_several_processes_one_prints_the_result(monkeypatch, capsys, world, rank, speaks):
    monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.setenv("RANK", rank)  # schedulers set it for other reasons, too
    assert cli.main(["--version"]) == 0
    assert bool(capsys.readouterr().out) == speaks


@pytest.mark.parametrize(
    ("words", "what"),
    [(["info", "nano-1m"], "nanollm info"), (["pretrain", "--config", "{config}", "--dry_run"], "--dry_run")],
)
def test_what_works_in_one_process_is_refused_under_torchrun(monkeypatch, capsys, words, what):
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = str(CONFIGS / "pretrain" / "nano-327m.yaml")
    assert cli.main([word.format(config=config) for word in words]) == 2
    assert f"{what} works in one process, got 2 from torchrun; run it without torchrun" in capsys.readouterr().err


def test_another_process_that_went_away_is_one_line_and_not_the_users_mistake(monkeypatch, capsys):
    def dispatch(arguments):
        raise ConnectionError("another process of the job went away")

    monkeypatch.setattr(cli, "dispatch", dispatch)
    assert cli.main(["pretrain"]) == 1
    assert capsys.readouterr().err == "nanollm pretrain: another process of the job went away\n"


@pytest.mark.parametrize(
    ("words", "tools"),
    [([], None), (["null"], None), (["none"], ["none"]), (["calculator", "python"], ["calculator", "python"])],
)
def test_tools_are_words_and_may_be_null(tmp_path, words, tools):
    config = tmp_path / "run.yaml"
    for given in (["--rollout.tools", *words] if words else [], [f"--config={config}"]):
        config.write_text(json.dumps({"rollout": {"tools": None if words == ["null"] else words or None}}))
        parsed, _ = parse_options("grpo", grpo, ["--bundle", "b", "--out", "o", "--train.steps", "1", *given])
        assert parsed.rollout.tools == tools
