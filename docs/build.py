"""Build the documentation site from docs/: `python -m docs.build`, or `make docs`.

All pages are staged in build/docs; zensical builds site/ from them with zensical.toml and fails on a broken link. Two
things are added: the generated reference (docs/reference.py), and a page for each file outside docs/ that a page links
to, so that the site needs no repository URL and shows the files it was built from.
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from docs import reference

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
CONFIG = "zensical.toml"
ELSEWHERE = "repository"  # where the files from outside docs/ are shown
FENCE = "~~~~~~~~"
HIDDEN = "---\nsearch:\n  exclude: true\n---\n\n"
BLOCK = re.compile(r"(^(?:```|~~~).*?^(?:```|~~~)[^\n]*$)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r'`[^`\n]*`|(\]\(|\b(?:src|srcset|href)=")([^)"#\s]+)')


def build(folder: Path) -> Path:
    """Make the site in `folder`, where zensical.toml says, and return where it is."""
    if folder != ROOT:
        shutil.copy(ROOT / CONFIG, folder / CONFIG)
    settings = tomllib.loads((folder / CONFIG).read_text(encoding="utf-8"))["project"]
    pages, site = folder / settings["docs_dir"], folder / settings["site_dir"]
    for old in (pages, site):
        shutil.rmtree(old, ignore_errors=True)
    stage(pages)
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean", "--config-file", CONFIG]
    if subprocess.run(command, cwd=folder, check=False).returncode:
        raise ValueError("zensical did not build the site; the lines above name the page and the link")
    return site


def stage(folder: Path) -> None:
    """Put all pages into `folder`: those of docs/, what they link to, and the reference."""
    waiting = [file for file in sorted(DOCS.rglob("*")) if file.is_file() and not file.suffix.startswith(".py")]
    done: set[Path] = set()
    while waiting:
        source = waiting.pop()
        if source not in done:
            done.add(source)
            waiting += put(source, folder / place_of(source))
    for name, text in reference.pages().items():
        write(folder / "reference" / name, text)


def place_of(source: Path) -> Path:
    """Where a file or a folder of the repository stands among the pages."""
    inside = source.relative_to(DOCS) if source.is_relative_to(DOCS) else ELSEWHERE / source.relative_to(ROOT)
    if source.is_dir():
        return inside / "index.md"
    return inside if source.is_relative_to(DOCS) or source.suffix == ".md" else inside.with_name(f"{inside.name}.md")


def put(source: Path, page: Path) -> list[Path]:
    """Write the page of a file or a folder, and return what it links to."""
    if source.is_dir():
        write(page, listing(source))
    elif source.suffix == ".md":
        text, linked = relink(source)
        write(page, text if source.is_relative_to(DOCS) else HIDDEN + text)
        return linked
    elif source.is_relative_to(DOCS):
        page.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, page)
    else:
        code = source.read_text(encoding="utf-8")
        name = source.relative_to(ROOT).as_posix()
        write(page, f"{HIDDEN}# {name}\n\n{FENCE}{source.suffix[1:]}\n{code}\n{FENCE}\n")
    return []


def relink(source: Path) -> tuple[str, list[Path]]:
    """A page with its links as they must read where it is put, and the files and folders that they lead to."""
    linked: list[Path] = []

    def moved(link: re.Match[str]) -> str:
        if not link[2] or "://" in link[2] or link[2].startswith("mailto:"):
            return link[0].replace("\\|", "|")  # a | in code: GitHub's tables want the backslash, Python's do not
        target = Path(os.path.normpath(source.parent / link[2]))
        if not target.exists() or not target.is_relative_to(ROOT):
            raise ValueError(f"{source.relative_to(ROOT)} links to {link[2]}, which is not there")
        linked.append(target)
        return link[1] + Path(os.path.relpath(place_of(target), place_of(source).parent)).as_posix()

    pieces = BLOCK.split(source.read_text(encoding="utf-8"))
    return "".join(piece if BLOCK.match(piece) else LINK.sub(moved, piece) for piece in pieces), linked


def listing(folder: Path) -> str:
    """A page that lists what is in a folder; pages of docs/ by their titles."""
    lines = [f"# {folder.name.capitalize()}", ""]
    for path in sorted(folder.iterdir()):
        if path.suffix == ".md":
            title = path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
            lines.append(f"- [{title}]({path.name})" if folder.is_relative_to(DOCS) else f"- {title}")
        elif not path.name.startswith(("_", ".")):
            lines.append(f"- `{path.name}`")
    return "\n".join([*lines, ""])


def write(page: Path, text: str) -> None:
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text, encoding="utf-8")


def main() -> int:
    try:
        print(build(ROOT) / "index.html")
    except (ValueError, OSError) as error:
        print(f"docs.build: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
