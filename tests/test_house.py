"""The files around the code say what is true."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from nanollm import cli
from nanollm.config import CONFIGS, kinds_of
from tests import prose
from tests.conftest import judge

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LARGEST_FILE_BYTES = 500_000


def under_version_control() -> list[Path]:
    """None outside a git checkout. What else people keep in their checkout is their own."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def tracked_files() -> list[Path]:
    return under_version_control() or pytest.skip("not a git checkout")


def texts() -> dict[Path, str]:
    files = {}
    for file in tracked_files():
        try:
            files[file] = file.read_bytes().decode()
        except UnicodeDecodeError:
            continue
    return files


def canonical(requirement: str) -> str:
    """The name in a requirement, as package indexes compare names."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\s<>=!~;\[]", requirement)[0]).lower()


def test_configs_holds_verbs_and_presets_only():
    folders = {folder.name for folder in CONFIGS.iterdir() if any(folder.glob("*"))}
    assert folders <= {"model", *cli.all_verbs()}


def test_every_dependency_is_pinned():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+(; .+)?", pin) for pin in pins)
    extras = PROJECT["optional-dependencies"]
    installed = [
        name for extra in ("data", "serve", "eval", "export", "bench", "docs", "dev") for name in extras[extra]
    ]
    wanted = {canonical(name) for name in [*PROJECT["dependencies"], *installed, "hatchling"]}
    assert wanted <= {canonical(pin) for pin in pins}


def test_nobody_is_told_to_install_the_project_of_others_that_is_called_nanollm():
    theirs = re.compile(r"""\binstall([ \t]+[-\w."'\[\],=<>]+)*[ \t]+["']?nanollm(?![-\w./])""")
    assert all(theirs.search(f"pip install {name}") for name in ("nanollm", '-U "nanollm[data]"'))
    assert [file for file, text in texts().items() if theirs.search(text)] == []


def test_an_old_python_can_read_make_py_and_be_told_that_it_is_too_old():
    ast.parse((ROOT / "make.py").read_text(encoding="utf-8"), feature_version=(3, 7))


def test_make_offers_the_commands_of_make_py():
    done = subprocess.run([sys.executable, "make.py"], cwd=ROOT, capture_output=True, text=True, check=False)
    offered = re.findall(r"^  (\w+) ", done.stderr, re.MULTILINE)
    assert done.returncode == 2
    assert f"\n{' '.join(offered)}:\n" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_the_change_log_tells_of_every_verb():
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert [verb for verb in cli.all_verbs() if f"`nanollm {verb}`" not in changes] == []


def test_every_room_is_on_the_map():
    rooms = {path.stem for path in (ROOT / "nanollm").iterdir() if path.suffix in ("", ".py")} - {"__pycache__"}
    listed = (ROOT / "docs" / "map.md").read_text(encoding="utf-8")
    assert [room for room in sorted(rooms) if not room.startswith("__") and f"`{room}" not in listed] == []


def test_the_map_names_every_module_and_no_other():
    package = ROOT / "nanollm"
    named = set(re.findall(r"`([a-z]+/\w+\.(?:py|cpp|h|mjs))`", (ROOT / "docs" / "map.md").read_text(encoding="utf-8")))
    files = [path for kind in ("py", "cpp", "h", "mjs") for path in package.glob(f"*/*.{kind}")]
    modules = {path.relative_to(package).as_posix() for path in files}
    assert {name for name in named if not any((root / name).exists() for root in (package, ROOT))} == set()
    assert {name for name in modules - named if not name.startswith("stages/") and "/__" not in name} == set()


def test_links_between_documents_lead_somewhere():
    broken = []
    for file, text in texts().items():
        if file.suffix == ".md":
            for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)|(?:src|srcset|href)=\"([^\"#]+)\"", text):
                link = next(filter(None, target))
                if "://" not in link and not (file.parent / link).exists():
                    broken.append(f"{file.relative_to(ROOT)}: {link}")
    assert broken == []


def commands_in(text: str) -> list[list[str]]:
    """The `nanollm VERB ...` lines in the code blocks of a document, line continuations joined."""
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [match[1].split("#")[0].split() for line in lines if (match := re.search(r"\bnanollm ([a-z]\w*\b.*)", line))]


def documents() -> list[str]:
    """README.md and its like, and every page of docs/, but for the log, which tells of commands as they were."""
    pages = {*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")} - {ROOT / "docs" / "log.md"}
    return sorted(page.relative_to(ROOT).as_posix() for page in pages & set(under_version_control() or pages))


@pytest.mark.parametrize("name", documents())
def test_commands_in_the_documents_exist(name):
    for verb, *words in commands_in((ROOT / name).read_text(encoding="utf-8")):
        assert verb in cli.all_verbs(), f"{name} names the verb {verb}"
        stage = importlib.import_module(cli.module_of(verb))
        named = {word[2:].partition("=")[0].replace("-", "_") for word in words if re.match(r"--\w", word)}
        unknown = named - kinds_of(stage).keys()
        assert not unknown, f"{name}: nanollm {verb} has no {unknown}"


def test_no_file_holds_a_path_of_one_machine():
    # The pattern is written so that it does not match itself.
    machine = re.compile(r"(?<![\w.:/])/(?:home|Users|work|root|mnt|opt|var/folders)/[\w.-]+|\b[A-Z]:\\\\?[Uu]sers")
    found = [f"{file.relative_to(ROOT)}: {hit[0]}" for file, text in texts().items() if (hit := machine.search(text))]
    assert found == []


def test_no_file_is_large():
    assert [file.name for file in tracked_files() if file.stat().st_size > LARGEST_FILE_BYTES] == []


def test_text_files_end_in_one_newline_and_have_no_trailing_spaces():
    def is_tidy(text: str) -> bool:
        return "\r" not in text and not re.search(r"[ \t]+$", text, re.MULTILINE) and (not text or text[-1] == "\n")

    assert [str(file.relative_to(ROOT)) for file, text in texts().items() if not is_tidy(text)] == []


def test_nothing_waits_to_be_filled_in():
    waiting = re.compile(r"\b(?:[A-Z]+_TEXT|(?:TIME|EXPECTED)(?:_[A-Z]+)?)$|^[A-Z]+_ROW$|^@[A-Z]{3,}", re.MULTILINE)
    files = {file: text for file, text in texts().items() if file.suffix in (".md", ".yaml")}
    assert [
        f"{file.relative_to(ROOT)}: {hit[0]}" for file, text in files.items() if (hit := waiting.search(text))
    ] == []


# --- their prose ---


def test_a_phrase_of_the_list_is_found_in_prose_and_not_in_code():
    text = "It goes on.\n\n```\ngoes on\n```\n\nNobody reads `nobody`, and the the page is long."
    assert list(prose.phrases_in(text)) == ["1: 'goes on'", "7: 'Nobody'", "7: 'the the'"]


def test_the_documents_have_no_phrase_of_the_list():
    found = {file.name: list(prose.phrases_in(file.read_text(encoding="utf-8"))) for file in prose.documents()}
    assert {name: phrases for name, phrases in found.items() if phrases} == {}


def test_proselint_has_nothing_to_say_about_the_documents():
    pytest.importorskip("proselint", reason='proselint is not installed: pip install -e ".[dev]"')
    found = {file.name: list(prose.lint(file.read_text(encoding="utf-8"))) for file in prose.documents()}
    assert {name: findings for name, findings in found.items() if findings} == {}
    assert list(prose.lint("A very unique page, needless to say."))


def test_a_sentence_of_the_readme_has_at_most_16_words_on_average():
    lengths = [len(words) for words in prose.sentences((ROOT / "README.md").read_text(encoding="utf-8"))]
    assert len(lengths) > 30
    assert sum(lengths) / len(lengths) <= 16


# --- the tests themselves ---


def test_a_test_that_wants_a_package_says_how_to_install_it():
    silent = []
    for file in sorted((ROOT / "tests").rglob("*.py")):
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "pytest.importorskip":
                reason = "".join(ast.unparse(word.value) for word in call.keywords if word.arg == "reason")
                if not re.search(r"pip install|this (system|Python) has no", reason):
                    silent.append(f"{file.relative_to(ROOT)}:{call.lineno}")
    assert silent == []


@pytest.mark.parametrize("reason, outcome", [("there is no go here", "failed"), ("needs a CUDA device", "skipped")])
@pytest.mark.skipif(sys.platform != "linux", reason="skips are judged where CI installs all that tests need")
def test_under_ci_a_skip_is_a_failure_unless_what_it_needs_cannot_be_had(monkeypatch, reason, outcome):
    def skipped() -> pytest.CollectReport:
        return pytest.CollectReport("a test", "skipped", ("a file", 1, f"Skipped: {reason}"), None)

    monkeypatch.setenv("CI", "true")
    assert judge(skipped()).outcome == outcome
    monkeypatch.delenv("CI")
    assert judge(skipped()).outcome == "skipped"


def test_the_page_has_the_figures_that_the_battery_measured():
    from tests.faults.report import PAGE, section

    assert section() in PAGE.read_text(encoding="utf-8")
