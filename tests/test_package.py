"""What people install, cite and report with is whole, and says what is true."""

import os
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from email import message_from_string
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from nanollm import __version__, extras

ROOT = Path(__file__).parent.parent
GITHUB = ROOT / ".github"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
STEM = f"{PROJECT['name'].replace('-', '_')}-{__version__}"  # of the files that a release makes
PYTHONS = ["3.11", "3.12", "3.13", "3.14"]
SYSTEMS = ["ubuntu-latest", "macos-latest", "windows-latest"]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of the wheel and the source archive, built from this tree without a network."""
    folder = tmp_path_factory.mktemp("dist")
    build(ROOT, folder)
    return folder


def build(source, folder, *targets):
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder), *targets]
    subprocess.run(command, cwd=source, check=True, capture_output=True)


@pytest.fixture(scope="module")
def wheel(built):
    return next(built.glob("*.whl"))


@pytest.fixture(scope="module")
def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return message_from_string(archive.read(f"{STEM}.dist-info/METADATA").decode())


def test_the_wheel_holds_every_file_of_the_package_and_every_preset(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    package = {path.relative_to(ROOT).as_posix() for path in tracked("nanollm")}
    presets = {f"nanollm/{path.relative_to(ROOT).as_posix()}" for path in tracked("configs")}
    assert held == package | presets
    kinds = {".py", ".cpp", ".h", ".html", ".js", ".css", ".yaml", ".txt", ".mjs", ".jinja"}
    assert {Path(name).suffix for name in held} >= kinds and "nanollm/py.typed" in held
    assert wheel.name == f"{STEM}-py3-none-any.whl"  # pure Python, for every system


def tracked(folder):
    """Files of a folder that are no traces of running it."""
    return [path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts]


def test_the_wheel_says_on_which_pythons_it_runs_and_what_it_needs(metadata):
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["Name"] == PROJECT["name"] == extras.DISTRIBUTION != "nanollm"
    assert PROJECT["scripts"] == {"nanollm": "nanollm.cli:main"}
    classifiers = metadata.get_all("Classifier")
    prefix = "Programming Language :: Python :: "
    assert [each.removeprefix(prefix) for each in classifiers if each.startswith(prefix)] == ["3 :: Only", *PYTHONS]
    core = [need for need in metadata.get_all("Requires-Dist") if "extra ==" not in need]
    assert set(map(canonical, core)) == set(map(canonical, PROJECT["dependencies"]))
    assert metadata["License-Expression"] == "MIT"
    assert metadata.get_payload() == (ROOT / "README.md").read_text(encoding="utf-8")


def canonical(requirement):
    need = Requirement(requirement)
    return need.name.lower(), frozenset(need.extras), need.specifier


def test_the_source_archive_builds_the_same_wheel(built, wheel, tmp_path):
    shutil.unpack_archive(next(built.glob("*.tar.gz")), tmp_path, filter="data")
    source = tmp_path / STEM
    build(source, tmp_path / "dist", "-t", "wheel")
    assert (tmp_path / "dist" / wheel.name).read_bytes() == wheel.read_bytes()
    for name in ("tests", "docs", "examples", "recipes", "benchmarks", "CHANGELOG.md", "CITATION.cff"):
        assert (source / name).exists()


@pytest.fixture
def installed(wheel, tmp_path):
    """The folder of programs of an environment that holds the wheel and borrows only the packages that it needs."""
    home = tmp_path / "environment"
    venv.create(home, with_pip=False)
    scripts = home / ("Scripts" if os.name == "nt" else "bin")
    python = scripts / f"python{'.exe' if os.name == 'nt' else ''}"
    packages = Path(said(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    pip = ["-m", "pip", "--disable-pip-version-check", "--python", python, "install", "--no-index", "--no-deps", wheel]
    said(sys.executable, *pip, cwd=tmp_path)
    # This adds a folder, not what its own path files add: nanollm as it is installed there stays out.
    (packages / "borrowed.pth").write_text(f"{Path(yaml.__file__).parent.parent}\n")
    where = said(python, "-c", "import nanollm; print(nanollm.__file__)", cwd=tmp_path).strip()
    assert Path(where) == packages / "nanollm" / "__init__.py"
    return scripts


def said(*command, cwd):
    done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_installed_wheel_goes_the_whole_way_outside_the_checkout(installed, tmp_path):
    command = installed / "nanollm"
    assert said(command, "--version", cwd=tmp_path).startswith(f"nanollm {__version__} (Python ")
    assert "327,007,232" in said(command, "info", "nano-327m", cwd=tmp_path)
    steps = ["--steps", "2", "--sft_steps", "1", "--grpo_steps", "1", "--exam", "2"]
    assert said(command, "demo", *steps, cwd=tmp_path) == f"{Path('runs/demo/summary.json')}\n"
    prompt = ["--prompt", "The", "--max_tokens", "4"]
    assert said(command, "generate", "runs/demo/pretrain/bundle", *prompt, cwd=tmp_path).startswith("The")


# What stands around the code


def forms():
    return sorted(path for path in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")


@pytest.mark.parametrize("path", forms(), ids=lambda path: path.name)
def test_an_issue_form_is_one_that_github_shows(path):
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert form.keys() == {"name", "description", "labels", "body"}
    asked = [part for part in form["body"] if part["type"] != "markdown"]
    assert {part["type"] for part in asked} <= {"input", "textarea"}
    assert all(part["attributes"]["label"] for part in asked)
    assert len({part["id"] for part in asked}) == len(asked)


def workflow(name):
    return yaml.safe_load((GITHUB / "workflows" / f"{name}.yml").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("name", "job"), [("ci", "test"), ("release", "install")])
def test_every_system_and_every_python_is_tried(name, job):
    matrix = workflow(name)["jobs"][job]["strategy"]["matrix"]
    assert matrix == {"os": SYSTEMS, "python": PYTHONS}


def test_a_release_is_installed_before_it_is_published_and_no_secret_is_kept():
    jobs = workflow("release")["jobs"]
    order = ["build", "install", "publish", "release"]
    assert [jobs[name].get("needs") for name in order] == [None, *order[:-1]]
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    assert "secrets." not in (GITHUB / "workflows" / "release.yml").read_text(encoding="utf-8")


NOTES = """# Changelog

## [Unreleased]

### Added

- Something of tomorrow.

## [1.2.0] - 2026-11-28

### Added

- A thing of today.

## [1.1.0] - 2026-10-01

- A thing of yesterday.
"""


@pytest.mark.parametrize(
    ("tag", "code", "notes"), [("v1.2.0", 0, "\n### Added\n\n- A thing of today.\n\n"), ("v1.3.0", 1, "")]
)
@pytest.mark.skipif(shutil.which("awk") is None, reason="there is no awk here: apt-get install mawk")
def test_the_notes_of_a_release_are_its_section_of_the_change_log(tmp_path, tag, code, notes):
    (tmp_path / "CHANGELOG.md").write_text(NOTES)
    step = next(step for step in workflow("release")["jobs"]["build"]["steps"] if step.get("name") == "notes")
    environment = {**os.environ, "GITHUB_REF_NAME": tag}
    done = subprocess.run(["bash", "-e", "-c", step["run"]], cwd=tmp_path, env=environment, check=False)
    assert (done.returncode, (tmp_path / "notes.md").read_text()) == (code, notes)


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["cff-version"], citation["type"]) == ("1.2.0", "software")
    assert (citation["version"], citation["license"]) == (__version__, PROJECT["license"])
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in PROJECT["authors"]]
