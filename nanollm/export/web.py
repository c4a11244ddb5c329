"""Writes a folder for any static host: the chat page, llama.cpp as WebAssembly and a GGUF; and talks to it in Chromium.

The page is the server's (serve/page) with tab.js in place of its requests. llama.cpp comes as wllama, from npm: a
version whose checksum is known, kept like compiled libraries, or a folder of the user's.

Sources: ngxson/wllama, README and guides; w3.org/TR/service-workers.
"""

import hashlib
import json
import shutil
import tarfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from http.client import HTTPException
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from nanollm.bundle import Bundle
from nanollm.durable import sha256_of, write_file, write_json
from nanollm.export.dense_to_moe import Dtype
from nanollm.export.gguf import file_name, write_gguf
from nanollm.kernels.build import cache_folder
from nanollm.progress import say

VERSION = "3.8.1"
ADDRESS = "https://registry.npmjs.org/@wllama/{name}/-/{name}-{version}.tgz"
SHA256 = {
    "wllama": "bbe65fcc6d128d7853aed6d1699db7541e51a0363dc0135b8b68153acbf74670",
    "wllama-compat": "94d433b69a17ae3a8b71d9e0a778630a40f320663a91888fd561bfdd617ef4ef",
}
TAKEN = {
    "wllama": {"index.min.js": "esm/index.min.js", "wllama.wasm": "esm/wasm/wllama.wasm", "LICENCE": "LICENCE"},
    "wllama-compat": {"compat.js": "wasm/wllama.js", "compat.wasm": "wasm/wllama.wasm"},  # for browsers such as Safari
}
"""Of each package of npm: our names of its files, and theirs."""
INSTALL = " ".join(["npm install", *(f"@wllama/{name}@{VERSION}" for name in SHA256)])
MOST_BYTES = 2**31 - 1  # of a file that a browser holds in one piece
PAGE = Path(__file__).parents[1] / "serve" / "page"
SCRIPTS = {"page/server.js": Path(__file__).with_name("tab.js"), "offline.js": Path(__file__).with_name("offline.js")}
RULES = (
    "default-src 'none'; script-src 'self' blob: 'wasm-unsafe-eval'; worker-src 'self' blob:; style-src 'self'; "
    "img-src data:; connect-src 'self' blob:; base-uri 'none'; form-action 'none'"
)
"""What the page may load: nothing from elsewhere, so that no word of a conversation can leave."""
HEAD = "<head>\n"


def check_size(size: float, what: str) -> None:
    """ValueError for a GGUF that no browser can hold."""
    if size > MOST_BYTES:
        raise ValueError(
            f"web: {what} has {size / 1e9:.1f} GB, a browser takes {MOST_BYTES / 1e9:.1f} GB at most; choose a smaller "
            f"--dtype, or another --format"
        )


def find_wllama(folder: Path | None) -> dict[str, bytes]:
    """The files of wllama, from npm or a folder of its packages; ValueError that says what to do."""
    if folder is None:
        return {ours: content for name in TAKEN for ours, content in unpacked(name).items()}
    files = {ours: folder / "@wllama" / name / path for name in TAKEN for ours, path in TAKEN[name].items()}
    if lost := [file for file in files.values() if not file.is_file()]:
        raise ValueError(f"{lost[0]} is missing; --wllama takes the folder node_modules that this fills: {INSTALL}")
    return {ours: file.read_bytes() for ours, file in files.items()}


def unpacked(name: str) -> dict[str, bytes]:
    """What is taken of a package of npm, which is loaded unless it was before."""
    kept = cache_folder() / f"{name}-{VERSION}.tgz"
    if not kept.is_file() or sha256_of(kept) != SHA256[name]:
        address = ADDRESS.format(name=name, version=VERSION)
        say(f"loading {address}")
        try:
            with urlopen(address, timeout=60) as answer:
                content = answer.read()
        except (OSError, HTTPException) as error:
            advice = f"where it can be, run {INSTALL}, and give --wllama node_modules"
            raise ValueError(f"{address} cannot be loaded ({error}); {advice}") from error
        if (found := hashlib.sha256(content).hexdigest()) != SHA256[name]:
            raise ValueError(f"{address} must have the sha256 {SHA256[name]}, got {found}; does a proxy change it?")
        write_file(kept, content)
    with tarfile.open(kept) as members:
        return {ours: members.extractfile(f"package/{path}").read() for ours, path in TAKEN[name].items()}  # type: ignore[union-attr]


def write_web(folder: Path, bundle: Bundle, dtype: Dtype, name: str, wllama: Path | None) -> str:
    """The whole page, into an empty folder; returns the name of the GGUF."""
    model = folder / file_name(name, dtype)
    write_gguf(model, bundle, dtype, name)
    check_size(model.stat().st_size, model.name)
    files = {f"page/{file.name}": file.read_bytes() for file in PAGE.iterdir()}
    files["index.html"] = guarded(files.pop("page/index.html").decode()).encode()
    files |= {name: script.read_bytes() for name, script in SCRIPTS.items()}
    files |= {f"wllama/{name}": content for name, content in find_wllama(wllama).items()}
    seal = hashlib.sha256(sha256_of(model).encode())
    for path in sorted(files):
        seal.update(files[path])
    edition = seal.hexdigest()[:16]
    kept = ["./", "model.json", "wllama/index.min.js", *(path for path in files if path.startswith("page/"))]
    files["offline.js"] = f"const EDITION = '{edition}';\nconst FILES = {kept};\n\n".encode() + files["offline.js"]
    for path, content in files.items():
        (folder / path).parent.mkdir(exist_ok=True)
        write_file(folder / path, content)
    card = {"id": name, "context_length": bundle.model.config.context_length, "examples": bundle.examples}
    stored = {"file": model.name, "bytes": model.stat().st_size, "edition": edition}
    write_json(folder / "model.json", card | stored)
    return model.name


def guarded(page: str) -> str:
    """A page that may load nothing from elsewhere, whatever host it lies on."""
    assert HEAD in page
    return page.replace(HEAD, f'{HEAD}    <meta http-equiv="Content-Security-Policy" content="{RULES}">\n', 1)
