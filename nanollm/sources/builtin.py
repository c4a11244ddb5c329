"""English text that is on every machine that can run this, without a network.

The interpreter's own language reference (`pydoc_data.topics`) and the documentation strings of the standard library
and of the packages that nanollm always brings with it. The sources are parsed where they lie, at run time: nothing is
imported, copied or downloaded. The same machine gives the same documents in the same order.
"""

import ast
import hashlib
import importlib.util
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from nanollm.sources.files import problem

BUILTIN = "builtin"  # what stands for it where files are asked for
PACKAGES = ("torch", "numpy", "sympy", "networkx", "jsonargparse", "rich", "jinja2", "fsspec")
SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "testing", "site-packages", "dist-packages", "_vendor", "vendor", "idlelib", "lib2to3"}
    | {"turtledemo", "_inductor", "_dynamo"}  # much code, little prose
)
MIN_CHARS = 200  # shorter ones are names and notes, not prose
SOURCE_BYTES_PER_DOCSTRING = 4000  # code with fewer docstrings costs more time to parse than its prose is worth

Node = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def documents() -> Iterator[str]:
    """Each topic, module, class (with its methods) and function that is documented at useful length, once."""
    seen: set[bytes] = set()
    for text in _candidates():
        if problem([text], ["text"]):  # a lone surrogate that someone documents
            continue
        digest = hashlib.blake2b(text.partition("\n")[2].encode(), digest_size=16).digest()  # under whatever name
        if digest not in seen:
            seen.add(digest)
            yield text


def _candidates() -> Iterator[str]:
    yield from _topics()
    yield from _docstrings(Path(sysconfig.get_path("stdlib")), "")
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        for folder in (spec and spec.submodule_search_locations) or []:
            yield from _docstrings(Path(folder), f"{name}.")


def _topics() -> Iterator[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some small distributions leave it out
        return
    for name in sorted(topics):
        if len(topics[name]) >= MIN_CHARS:
            yield f"{name}\n\n{topics[name].strip()}"


def _docstrings(folder: Path, prefix: str) -> Iterator[str]:
    for path in sorted(folder.rglob("*.py")):
        inside = path.relative_to(folder)
        if SKIPPED_FOLDERS.isdisjoint(inside.parts):
            module = prefix + ".".join(inside.with_suffix("").parts).removesuffix("__init__").rstrip(".")
            yield from _of_file(path, module.rstrip("."))


def _of_file(path: Path, module: str) -> Iterator[str]:
    source = path.read_bytes()
    if source.count(b'"""') * SOURCE_BYTES_PER_DOCSTRING < len(source):
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about other people's escape sequences
            tree = ast.parse(source)
    except (SyntaxError, ValueError):  # templates, and examples of what is wrong
        return
    yield from _of_node(tree, module)
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _of_node(node, f"{module}.{node.name}")
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            yield from _of_call(node.value)  # add_docstr(torch.abs, "...")


def _of_node(node: Node, name: str) -> Iterator[str]:
    """The docstring under its name; for a class, those of its methods follow."""
    parts = [ast.get_docstring(node) or ""]
    if isinstance(node, ast.ClassDef):
        methods = [method for method in node.body if isinstance(method, ast.FunctionDef)]
        texts = ((method.name, ast.get_docstring(method)) for method in methods)
        parts += [f"{node.name}.{method}\n\n{text}" for method, text in texts if text]
    text = "\n\n".join(filter(None, parts))
    if len(text) >= MIN_CHARS:
        yield f"{name}\n\n{text}"


def _of_call(call: ast.Call) -> Iterator[str]:
    for node in ast.walk(call):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) >= MIN_CHARS:
            yield node.value.strip()
