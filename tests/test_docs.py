"""The pages say what is true, the reference says all of it, and a site comes out."""

import importlib
import re
import tomllib
from collections.abc import Iterator, Mapping
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from docs import build, reference
from nanollm import cli
from nanollm.config import CONFIGS, kinds_of, parse_options, read_mapping
from nanollm.stages import pretrain
from nanollm.train.metrics import read_metrics
from tests.stages.conftest import run_config, token_files, tokenizer_path

__all__ = ["run_config", "token_files", "tokenizer_path"]


def page(name: str) -> str:
    return (build.DOCS / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def pages():
    return reference.pages()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """All of it, built as `make docs` builds it, but elsewhere."""
    return build.build(tmp_path_factory.mktemp("site"))


# --- the reference ---


def test_the_reference_has_a_row_for_every_option_of_every_verb(pages):
    missing = {}
    for verb in cli.all_verbs():
        kinds = kinds_of(importlib.import_module(cli.module_of(verb)))
        rows = re.findall(r"^\| `--([\w.]+)` \|", pages[f"{verb}.md"] + pages["index.md"], re.MULTILINE)
        missing[verb] = kinds.keys() - set(rows)
    assert {verb: names for verb, names in missing.items() if names} == {}


def keys(mapping: Mapping, prefix: str = "") -> Iterator[str]:
    for key, value in mapping.items():
        yield prefix + key
        if isinstance(value, dict):
            yield from keys(value, f"{prefix}{key}.")


def test_the_reference_has_every_key_of_the_yaml_files(pages):
    unknown = []
    for file in sorted(CONFIGS.rglob("*.yaml")):
        is_model = file.parent.name == "model"
        rows = pages["pretrain.md" if is_model else f"{file.parent.name}.md"]
        named = keys(read_mapping(file), "model." if is_model else "")
        unknown += [f"{file.name}: {key}" for key in named if f"| `--{key}` |" not in rows and not is_free(key)]
    assert unknown == []


def is_free(key: str) -> bool:
    """Names that a user gives: of folders to mix, of rewards."""
    return key.startswith(("data.", "reward.weights."))


def test_a_row_says_what_to_type_what_holds_without_it_and_what_it_means():
    rows = reference.page_of("eval").splitlines()
    assert "| `--bundle` | `path` | required | Folder of a bundle, such as runs/demo/pretrain/bundle. |" in rows
    assert "| `--n` | `int` | `500` | Number of problems: the first of the split, or all if it has fewer. |" in rows
    assert "| `--temperature` | `float` | `1.0` | Sampling temperature of --samples. |" in rows
    rows = reference.page_of("pretrain").splitlines()
    assert "| `--model.n_heads` | `int` | of the preset | Attention heads per block. |" in rows
    rows = reference.page_of("info").splitlines()
    assert (
        "| `--dtype` | `bfloat16` \\| `float16` \\| `float32` | `bfloat16` | What training and the cache compute in. |"
        in rows
    )


def test_the_reference_shows_yaml_that_the_verb_takes(tmp_path):
    shown = re.search(r"## As YAML\n.*?```yaml\n(.*?)```", reference.page_of("generate"), re.DOTALL)[1]
    (tmp_path / "all.yaml").write_text(shown, encoding="utf-8")
    stage = importlib.import_module(cli.module_of("generate"))
    words = ["a-bundle", "--prompt", "Once", "--config", str(tmp_path / "all.yaml")]
    assert parse_options("generate", stage, words)[0] == stage.Config(bundle=Path("a-bundle"), prompt=["Once"])


def test_the_reference_shows_the_runs_that_come_with_a_verb_and_what_their_files_say():
    text = reference.page_of("sft")
    for file in (CONFIGS / "sft").glob("*.yaml"):
        assert f"`configs/sft/{file.name}`\n\n```\nnanollm sft --config configs/sft/{file.name}\n" in text


# --- the site ---


def test_links_are_turned_to_where_their_targets_are_shown():
    text, linked = build.relink(build.DOCS / "security.md")
    assert "[SECURITY.md](repository/SECURITY.md)" in text
    assert "[reliability](reliability.md)" in text
    assert build.ROOT / "SECURITY.md" in linked
    assert build.place_of(build.DOCS / "decisions").as_posix() == "decisions/index.md"
    assert build.place_of(build.ROOT / "tests" / "faults" / "disk.c").as_posix() == "repository/tests/faults/disk.c.md"


def test_links_in_code_are_left_alone_and_one_that_leads_nowhere_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(build, "DOCS", tmp_path / "docs")
    (tmp_path / "docs").mkdir()
    source = tmp_path / "docs" / "page.md"
    source.write_text("`a[1](nowhere.md)`\n\n```\na[1](nowhere.md)\n```\n\n[web](https://nowhere.example/)\n")
    assert build.relink(source) == (source.read_text(), [])
    source.write_text("![picture](figures/none.svg)\n")
    with pytest.raises(ValueError, match=re.escape("page.md links to figures/none.svg, which is not there")):
        build.relink(source)


def named_in(nav: object) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    else:
        for each in nav.values() if isinstance(nav, dict) else nav:
            yield from named_in(each)


def test_every_page_of_docs_is_in_the_navigation_once_and_nothing_else_is():
    nav = list(named_in(tomllib.loads((build.ROOT / build.CONFIG).read_text(encoding="utf-8"))["project"]["nav"]))
    written = {path.relative_to(build.DOCS).as_posix() for path in build.DOCS.rglob("*.md")}
    made = {"reference/index.md", "reference/*.md", "decisions/index.md", "decisions/*.md"}
    assert len(nav) == len(set(nav))
    assert set(nav) - made == {name for name in written if not name.startswith("decisions/")}


class Links(HTMLParser):
    """What a page loads by itself, and where its links lead."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded, self.linked = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("src", "srcset") or (name == "href" and tag == "link"):
                self.loaded.append(value)
            elif name == "href":
                self.linked.append(value)


@pytest.mark.long
def test_the_site_is_whole_and_loads_nothing_from_elsewhere(site):
    html = {file: Links(file.read_text(encoding="utf-8")) for file in site.rglob("*.html") if file.name != "404.html"}
    assert [each for links in html.values() for each in links.loaded if "://" in each] == []
    broken = []
    for file, links in html.items():
        inside = [each for each in links.loaded + links.linked if "://" not in each and not each.startswith("data:")]
        for target in (unquote(each.partition("#")[0]) for each in inside):
            if not (file.parent / target).exists():
                broken.append(f"{file.relative_to(site)}: {target}")
    assert broken == []
    start = html[site / "index.html"].linked
    assert {f"./reference/{verb}.html" for verb in cli.all_verbs()} <= set(start)
    assert "./decisions/0001-progress-on-floor-0.html" in start


# --- what is written by hand ---


def test_files_md_names_every_file_of_a_run_and_every_key_of_its_metrics(run_config):
    told, config = page("files.md"), run_config(steps=3)
    pretrain.run(config)
    for file in config.out.iterdir():
        name = f"{file.name}/" if file.is_dir() else file.name
        assert f"| `{name}" in told, f"{name} is not on the page"
    named = {key for line in read_metrics(config.out) for key in line}
    assert {key for key in named if f"`{key}`" not in told} == set()


def test_files_md_names_every_variable_that_the_code_reads():
    code = "".join(file.read_text(encoding="utf-8") for file in (build.ROOT / "nanollm").rglob("*.py"))
    read = set(re.findall(r'"(\w+)" in os\.environ', code))
    for name in re.findall(r'os\.environ(?:\.get|\.setdefault)?[\[(]("?[A-Z]\w+)', code):
        is_word = name.startswith('"')  # else a constant
        read.add(name[1:] if is_word else re.search(rf'^{name} = "(\w+)"$', code, re.MULTILINE)[1])
    assert {"NANOLLM_API_KEY", "WORLD_SIZE"} <= read
    assert {name for name in read if f"`{name}`" not in page("files.md")} == set()


def test_own_data_md_shows_what_the_code_makes_of_each_kind_of_file():
    pytest.importorskip("pyarrow", reason='pyarrow is not installed: pip install -e ".[data]"')
    assert reference.forms() in Path("docs/howto/own-data.md").read_text("utf-8")


def test_the_glossary_defines_each_word_once_and_points_to_code_that_exists():
    places = re.findall(r"`([a-z]+(?:/\w+)?\.(?:py|cpp))`", page("glossary.md"))
    assert len(places) > 50
    assert [place for place in places if not (build.ROOT / "nanollm" / place).exists()] == []
    named = re.findall(r"`([a-z]+(?:/\w+)?\.py)` `(\w+)`", page("glossary.md"))
    assert len(named) > 15
    for place, name in named:
        code = (build.ROOT / "nanollm" / place).read_text(encoding="utf-8")
        assert re.search(rf"^(class|def) {name}\b", code, re.MULTILINE), f"{place} has no {name}"
    words = re.findall(r"^\| \*\*(.+?)\*\*", page("glossary.md"), re.MULTILINE)
    assert len(words) == len(set(words)) > 60
