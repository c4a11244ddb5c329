"""make.py installs what a command needs, once, with uv or pip, and says in one line what is in its way."""

import importlib.util
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from nanollm.kernels import attention

ROOT = Path(__file__).parent.parent
FREE = shutil.disk_usage(ROOT)


class Installed:
    """make.py in a folder of its own, with every command that it would run written down instead."""

    def __init__(self, folder, monkeypatch):
        for name in ("make.py", "pyproject.toml", "requirements.txt"):
            shutil.copy(ROOT / name, folder)
        spec = importlib.util.spec_from_file_location("make", folder / "make.py")
        self.make = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.make)
        self.folder, self.commands, self.variables = folder, [], []
        self.lacking, self.failing = set(), ()
        monkeypatch.setattr(self.make, "run", self.run)
        monkeypatch.setattr(self.make, "works", self.works)

    def __call__(self, *words):
        """The exit code of `python make.py WORDS`; self.commands are its commands, by their words."""
        self.commands, self.variables = [], []
        return self.make.main(list(words))

    def run(self, command, **variables):
        short = [Path(word).name if Path(word).is_absolute() else word for word in command]
        self.commands.append(" ".join(short))
        self.variables.append(variables)
        if any(words in self.commands[-1] for words in self.failing):
            return 1
        if "venv" in command:
            self.make.PYTHON.parent.mkdir(parents=True, exist_ok=True)
            self.make.PYTHON.touch()
        return 0

    def works(self, python, code):
        """The .venv that run() has made has everything, and so have other Pythons, but for what is lacking."""
        exists = Path(python).exists() and Path(python) not in self.lacking
        return exists and not any(name in code for name in self.lacking if isinstance(name, str))


@pytest.fixture
def make(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_"))]:
        monkeypatch.delenv(name)
    (tmp_path / "bin").mkdir()
    (tmp_path / "a b ü").mkdir()
    return Installed(tmp_path / "a b ü", monkeypatch)


@pytest.fixture
def uv(tmp_path):
    program = tmp_path / "bin" / ("uv.exe" if os.name == "nt" else "uv")
    program.touch(mode=0o755)
    return program


PIP = "-m pip install --disable-pip-version-check --no-input --no-compile"
PYTHON = "python.exe" if os.name == "nt" else "python"


def said(capsys):
    """What make.py has said, without its name before each line."""
    return capsys.readouterr().err.replace("make.py: ", "").splitlines()


def test_the_demo_installs_the_core_and_the_tests_add_the_rest_each_once(make):
    assert make("demo", "--steps", "3") == 0
    made, installed, demo = make.commands
    assert made.endswith("-m venv .venv")
    assert installed == f"{PYTHON} {PIP} -e ."
    assert demo == f"{PYTHON} -m nanollm demo --steps 3"
    assert make("demo") == 0
    assert make.commands == [f"{PYTHON} -m nanollm demo"]  # nothing that needs a network
    assert make("test") == 0
    assert make.commands[:2] == [
        f"{PYTHON} {PIP} -r requirements.txt",
        f"{PYTHON} {PIP} --no-deps --no-build-isolation -e .",
    ]
    assert make("test") == make("demo") == 0
    assert make.commands == [f"{PYTHON} -m nanollm demo"]  # what the tests need includes it


def test_pip_takes_the_pins_for_the_core_and_for_what_builds_it(make, monkeypatch):
    monkeypatch.setenv("PIP_CONSTRAINT", "theirs.txt")
    assert make("demo") == 0
    assert make.variables[1] == {
        "PIP_CONSTRAINT": "theirs.txt requirements.txt",
        "PIP_BUILD_CONSTRAINT": "requirements.txt",
    }


def test_uv_installs_where_it_is_on_path_with_the_same_pins(make, uv):
    assert make("demo") == make("demo") == 0
    assert make("test") == 0
    assert (
        make.commands[0] == f"{uv.name} pip install --python {PYTHON} -r requirements.txt -b requirements.txt pip -e ."
    )
    shutil.rmtree(make.make.VENV)
    assert make("demo") == 0
    made, installed, _ = make.commands
    assert made.startswith(f"{uv.name} venv --quiet --python ")
    assert installed == f"{uv.name} pip install --python {PYTHON} -c requirements.txt -b requirements.txt pip -e ."


@pytest.mark.parametrize(
    ("given", "handed"),
    [
        ({}, {"UV_TORCH_BACKEND": "auto"}),
        ({"UV_TORCH_BACKEND": "cpu"}, {}),
        ({"UV_DEFAULT_INDEX": "https://mirror"}, {}),
        ({"PIP_FIND_LINKS": "one two"}, {"UV_FIND_LINKS": "one,two"}),
        (
            {"PIP_INDEX_URL": "https://a", "PIP_EXTRA_INDEX_URL": "b"},
            {"UV_DEFAULT_INDEX": "https://a", "UV_INDEX": "b"},
        ),
        ({"PIP_INDEX_URL": "https://a", "UV_DEFAULT_INDEX": "https://b"}, {}),
    ],
)
def test_uv_chooses_the_torch_for_the_gpu_unless_the_user_names_a_mirror(make, uv, monkeypatch, given, handed):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert make("demo") == 0
    assert make.variables[1] == handed


def test_where_uv_fails_pip_goes_on_and_that_is_said(make, uv, capsys):
    make.failing = ("uv pip", "uv.exe pip")
    make.lacking = {"import pip"}  # as uv makes environments
    assert make("demo") == 0
    assert make.commands[2].endswith("-m venv .venv")
    assert make.commands[3] == f"{PYTHON} {PIP} --force-reinstall -e ."  # nobody knows how far uv came
    assert "uv failed, the lines above say why; pip does it instead" in said(capsys)


def test_an_installation_that_was_interrupted_is_done_again(make):
    assert make("test") == 0
    (make.folder / "requirements.txt").write_text("numpy==0\n")
    make.failing = (" pip ",)
    assert make("test") == 1
    shutil.copy(ROOT / "requirements.txt", make.folder)  # the pins of before, but who knows what is installed
    make.failing = ()
    assert make("test") == 0
    # A package that lost its files to a full disk may look installed.
    assert f"{PYTHON} {PIP} --force-reinstall -r requirements.txt" in make.commands
    make("test")
    assert not any("pip" in command for command in make.commands)


@pytest.mark.parametrize("module", ["ensurepip", "venv"])
def test_a_python_without_venv_is_named_with_what_installs_it(make, module, capsys):
    make.lacking = {module}
    assert make("demo") == 1
    assert make.commands == []
    (line,) = said(capsys)
    assert line.endswith("has no venv or no ensurepip; on Debian and Ubuntu: sudo apt install python3-venv")


def test_an_environment_that_was_made_elsewhere_is_made_anew(make, capsys, tmp_path):
    assert make("demo") == 0
    there, here = make.make.VENV, tmp_path / "copy" / ".venv"
    shutil.copytree(there, here)
    (here / "old").touch()
    make.make.VENV, make.make.PYTHON = here, here / make.make.PYTHON.relative_to(there)
    make.make.HERE, make.make.STAMP = here.parent, here / make.make.STAMP.name
    for name in ("pyproject.toml", "requirements.txt"):
        shutil.copy(ROOT / name, here.parent)
    capsys.readouterr()
    assert make("demo") == 0
    assert not (here / "old").exists()
    assert make.commands[0].endswith("-m venv .venv")
    anew = "making .venv anew: it comes from another place, or its Python is missing or too old"
    assert said(capsys)[0] == anew


def test_an_environment_whose_python_is_gone_is_made_anew(make):
    assert make("demo") == 0
    make.make.PYTHON.unlink()
    assert make("demo") == 0
    assert make.commands[0].endswith("-m venv .venv")


def test_an_environment_of_the_users_own_is_kept(make):
    make.run(["python", "-m", "venv"])
    (make.make.VENV / "theirs").touch()
    assert make("demo") == 0
    assert (make.make.VENV / "theirs").exists()


@pytest.mark.parametrize(("failing", "what"), [("-m venv", "making .venv"), ("-m pip", "installing")])
def test_a_full_disk_is_named_with_what_it_takes(make, monkeypatch, capsys, failing, what):
    make.failing = (failing,)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: FREE._replace(free=5_000_000))
    assert make("demo") == 1
    last = f"{what} failed; the disk may be full: {make.folder} has 5 MB left, and this takes 900. Make room"
    assert said(capsys)[-1] == last
    monkeypatch.setattr(shutil, "disk_usage", lambda place: FREE._replace(free=10**12))
    assert make("demo") == 1
    assert said(capsys)[-1].startswith(f"{what} failed; the lines above say why. The same command tries again; ")


def test_an_old_python_first_on_path_finds_a_newer_one(make, monkeypatch, capsys):
    monkeypatch.setattr(sys, "version_info", (3, 9, 2, "final", 0))
    with pytest.raises(SystemExit) as stop:
        make("demo")
    assert str(stop.value).startswith("make.py: NanoLLM needs Python 3.11 or newer, this is ")
    assert str(stop.value).endswith(" and PATH has no other")
    newer = make.folder.parent / "bin" / ("python3.12.exe" if os.name == "nt" else "python3.12")
    newer.touch(mode=0o755)
    assert make("demo") == 0
    assert make.commands[0] == f"{newer.name} -m venv .venv"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no process to a core")
@pytest.mark.parametrize(("cores", "workers"), [(1, 1), (2, 2), (64, 4)])
def test_the_tests_run_on_the_cores_that_there_are(make, monkeypatch, cores, workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    assert make("test", "-k", "x") == 0
    assert make.commands[-1] == f"{PYTHON} -m pytest -n {workers} -k x"


# --- with real packages, from the network ---

MAX_DISTRIBUTIONS, MAX_MB = 30, 1200


def output(*command, cwd, **variables):
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env={**os.environ, **variables}, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout, done.stderr


CORE = 'import runpy, sys; sys.exit(runpy.run_path("make.py")["setup"]([], "core"))'  # what `make demo` does first
TOKENIZER, BUNDLE = "made/tokenizer", "made/run/bundle"
ROAD = (  # from text to a bundle, and to text again
    f"tokenizer --corpus tests/story.txt --output_dir {TOKENIZER} --vocab_size 600",
    f"preprocess text --input tests/story.txt --tokenizer_path {TOKENIZER} --save_dir made/tokens",
    f"pretrain --model nano-1m --model.vocab_size 600 --model.context_length 64 --tokenizer_path {TOKENIZER} "
    "--data made/tokens --out made/run --train.steps 1 --train.batch_size 2 --train.micro_batch_size 2",
    f"generate {BUNDLE} --prompt The --max_tokens 4",
)


@pytest.fixture(scope="module")
def core(tmp_path_factory):
    """A checkout with the core alone, and a bundle that was made with it."""
    folder = tmp_path_factory.mktemp("core") / "checkout"
    here = [".git", ".venv", "runs", "node_modules", ".*_cache", "__pycache__"]
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*here))
    code, _, err = output(sys.executable, "-c", CORE, cwd=folder)
    assert code == 0, err
    for words in ROAD:
        code, _, err = output(python_of(folder / ".venv"), "-m", "nanollm", *words.split(), cwd=folder)
        assert code == 0, err
    return folder


def python_of(environment):
    return environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


@pytest.mark.slow
def test_the_core_is_lean(core):
    code, listed, _ = output(python_of(core / ".venv"), "-m", "pip", "list", "--format=freeze", cwd=core)
    assert code == 0
    assert len(listed.split()) <= MAX_DISTRIBUTIONS
    size = sum(file.lstat().st_size for file in (core / ".venv").rglob("*"))
    assert size / 1e6 <= MAX_MB


@pytest.mark.slow
def test_a_second_demo_needs_no_network(core):
    nowhere = "http://127.0.0.1:9"
    away = dict.fromkeys(("http_proxy", "https_proxy", "PIP_INDEX_URL", "UV_DEFAULT_INDEX"), nowhere)
    code, out, err = output(sys.executable, "make.py", "demo", "--help", cwd=core, **away)
    assert code == 0, err
    assert "--grpo_steps" in out
    assert "installing" not in err


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no process to a core")
def test_without_a_compiler_and_on_one_core_it_goes_on_and_says_what_is_slower(core, tmp_path):
    one = "import os, runpy; os.sched_setaffinity(0, [0]); runpy.run_module('nanollm', run_name='__main__')"
    none = {"PATH": str(tmp_path), "CXX": "", "XDG_CACHE_HOME": str(tmp_path)}
    said = ""
    for words in ROAD:
        again = words.replace("made/", "again/")
        code, _, err = output(python_of(core / ".venv"), "-c", one, *again.split(), cwd=core, **none)
        assert code == 0, err
        said += err
    why = "no C++ compiler was found (on Debian and Ubuntu: sudo apt install g++)"
    slower = ["words are counted slowly", "several times slower"]
    if attention.is_slow_without():  # PyTorch's own is as fast where the processor has AMX
        slower.append("takes several times as long")
    for words in slower:
        assert f"{words}: {why}" in said


CURATE = f"curate --input texts.jsonl --tokenizer_path {TOKENIZER} --evals.enabled false --dedup false "
CURATE += "--filters.gopher_repetition false --filters.gopher_quality false --save_dir curated"
WITHOUT = {  # what each extra is for: a command, its code once the extra is there, and a word of what it says then
    "completion": ("--completion bash", 0, ""),
    "serve": (f"serve {BUNDLE} --port PORT", 2, "cannot listen"),
    "export": (f"export {BUNDLE} --out exported --verify false", 0, "written to exported"),
    "eval": (f"eval {BUNDLE} --harness none", 2, "none"),
    "data": (CURATE, 0, "what was removed is listed"),
    "data,ray": (f"{CURATE}_by_ray --executor ray --mem_gb 1", 0, "what was removed is listed"),
    "track": ("pretrain --config made/run/config.yaml --out made/tracked --trackers tensorboard", 0, ""),
}


@pytest.mark.slow
@pytest.mark.parametrize("extra", WITHOUT)
def test_in_a_clean_environment_the_line_that_a_verb_says_brings_its_extra(core, tmp_path, extra):
    """The environment has nothing but pip, and borrows the core."""
    words, code, word = WITHOUT[extra]
    (core / "texts.jsonl").write_text('{"text": "Some words that are worth keeping, and more of them."}\n')
    venv.create(tmp_path / "environment", with_pip=True)
    python = python_of(tmp_path / "environment")
    packages = output(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path)[1].strip()
    borrowed = output(
        python_of(core / ".venv"), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path
    )[1]
    (Path(packages) / "borrowed.pth").write_text(borrowed)
    installed = []
    with socket.create_server(("127.0.0.1", 0)) as taken:
        command = [python, "-m", "nanollm", *words.replace("PORT", str(taken.getsockname()[1])).split()]
        ended, _, err = output(*command, cwd=core)
        while line := re.search(
            r'needs the package \w+; in the folder of NanoLLM: pip (install -e "\.\[(.*)\]")\n$', err
        ):
            assert (ended, line[2] in installed) == (2, False)
            installed.append(line[2])
            pip = [python, "-m", "pip", *shlex.split(line[1])]
            assert output(*pip, cwd=core, PIP_CONSTRAINT="requirements.txt")[0] == 0
            ended, _, err = output(*command, cwd=core)
    assert installed[-1:] == [extra], err
    assert ended == code, err
    assert word in err
