"""Writes a folder for any static host: the chat page, llama.cpp as WebAssembly and a GGUF; and talks to it in Chromium.

The page is the server's (serve/page) with tab.js in place of its requests. llama.cpp comes as wllama, which npm
installs: a version whose checksum is known, kept like compiled libraries, or a folder of the user's.

Sources: ngxson/wllama, README and guides; w3.org/TR/service-workers.
"""

import hashlib
import shutil
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from importlib.util import find_spec
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch

from nanollm.bundle import Bundle
from nanollm.durable import new_folder, sha256_of, write_file, write_json
from nanollm.export import verify
from nanollm.export.dense_to_moe import Dtype
from nanollm.export.engines import ask_llama_cpp
from nanollm.export.gguf import file_name, write_gguf
from nanollm.export.verify import Check, Ids
from nanollm.kernels.build import cache_folder
from nanollm.progress import Progress, say
from nanollm.sources import builtin
from nanollm.text.chat import Conversation, encode_prompt, reply_ends
from nanollm.text.tokenizer import END

VERSION = "3.8.1"
SHA256 = "e90a989ec46f878578e9f6d836829daf9d0e06ad958d6b02a1e5e4a46901f9c2"  # of what is taken, in order of name
TAKEN = {
    "wllama": {"index.min.js": "esm/index.min.js", "wllama.wasm": "esm/wasm/wllama.wasm", "LICENCE": "LICENCE"},
    "wllama-compat": {"compat.js": "wasm/wllama.js", "compat.wasm": "wasm/wllama.wasm"},  # for browsers such as Safari
}
"""Of each package of npm: our names of its files, and theirs."""
INSTALL = " ".join(["npm install", *(f"@wllama/{name}@{VERSION}" for name in TAKEN)])
MOST_BYTES = 2**31 - 1  # of a file that a browser holds in one piece
PAGE = Path(__file__).parents[1] / "serve" / "page"
SCRIPTS = {"page/server.js": Path(__file__).with_name("tab.js"), "offline.js": Path(__file__).with_name("offline.js")}
RULES = (
    "default-src 'none'; script-src 'self' blob: 'wasm-unsafe-eval'; worker-src 'self' blob:; style-src 'self'; "
    "img-src data:; connect-src 'self' blob:; base-uri 'none'; form-action 'none'"
)
"""What the page may load: nothing from elsewhere, so that no word of a conversation can leave."""
HEAD = "<head>\n"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
INSTALL_BROWSER = "pip install playwright && playwright install chromium"
OWN = ("data:", "blob:")  # addresses of what a page made itself
ROUNDED = 0.1
"""How far apart logits may be where each engine rounds what it computes with, in its own order."""
Reply = tuple[list[tuple[int, float]], str]  # id and log-probability of each token, and why there are no more
ASK = Path(__file__).with_name("ask_tab.js")


def check_size(size: float, what: str) -> None:
    """ValueError for a GGUF that no browser can hold."""
    if size > MOST_BYTES:
        raise ValueError(
            f"web: {what} has {size / 1e9:.1f} GB, a browser takes {MOST_BYTES / 1e9:.1f} GB at most; choose a smaller "
            f"--dtype, or another --format"
        )


def find_wllama(folder: Path | None) -> dict[str, bytes]:
    """The files of wllama, which npm installs, or from a folder of its packages; ValueError that says what to do."""
    if folder is None:
        return installed()
    files = {ours: folder / "@wllama" / name / path for name in TAKEN for ours, path in TAKEN[name].items()}
    if lost := [file for file in files.values() if not file.is_file()]:
        raise ValueError(f"{lost[0]} is missing; --wllama takes the folder node_modules that this fills: {INSTALL}")
    return {ours: file.read_bytes() for ours, file in files.items()}


def installed() -> dict[str, bytes]:
    """The files of wllama, installed from the registry that npm is set to, unless they were before."""
    kept = cache_folder() / f"wllama-{VERSION}"
    if not kept.is_dir():
        say(f"{INSTALL}, once, into {kept}")
        with new_folder(kept) as draft:
            command = [shutil.which("npm") or "npm", *INSTALL.split()[1:], "--prefix", str(draft), "--ignore-scripts"]
            try:
                subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=True)
            except (OSError, subprocess.CalledProcessError) as error:
                reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[0]
                advice = "run it where there are npm and a network, then give --wllama node_modules"
                raise ValueError(f"{INSTALL} failed ({reason}); {advice}") from error
    files = find_wllama(kept / "node_modules")
    if (found := hashlib.sha256(b"".join(files[name] for name in sorted(files))).hexdigest()) != SHA256:
        raise ValueError(f"the files of wllama in {kept} must have the sha256 {SHA256}, got {found}; remove the folder")
    return files


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
    told = {
        "id": name,
        "context_length": bundle.model.config.context_length,
        "examples": bundle.examples,
        "marks": sorted(bundle.tokenizer.symbols.values()),
        "file": model.name,
        "bytes": model.stat().st_size,
        "edition": edition,
    }
    write_json(folder / "model.json", told)
    return model.name


def guarded(page: str) -> str:
    """A page that may load nothing from elsewhere, whatever host it lies on."""
    assert HEAD in page
    return page.replace(HEAD, f'{HEAD}    <meta http-equiv="Content-Security-Policy" content="{RULES}">\n', 1)


# --- the proof ---


class Quiet(SimpleHTTPRequestHandler):
    """What python -m http.server is, without its log."""

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The address of a folder on this machine, as any static host has it."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        server.handle_error = lambda *_: None  # type: ignore[method-assign]  # a browser breaks off what it needs no more
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser without a window; ValueError that says how to install it."""
    if find_spec("playwright") is None:
        raise ValueError(f"checking a page needs playwright: {INSTALL_BROWSER}")
    sync_api = import_module("playwright.sync_api")
    program = next(filter(None, map(shutil.which, BROWSERS)), None)  # without one, playwright's own
    with sync_api.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=program)
        except sync_api.Error as error:
            raise ValueError(f"Chromium does not start ({str(error).splitlines()[0]}): {INSTALL_BROWSER}") from error
        yield browser
        browser.close()


def compare_in_browser(model: Path, bundle: Bundle, dtype: str, prompts: int) -> Iterator[Check]:
    """The table for the page around a GGUF, line by line: in Chromium it replies as llama.cpp does with this file."""
    tokenizer, context = bundle.tokenizer, bundle.model.config.context_length
    count = min(verify.REPLY_TOKENS, context // 2)
    texts = chain(bundle.examples, (f"{text[:80]} {number}?" for number, text in enumerate(builtin.documents())))
    asked = ((text, encode_prompt(Conversation.of(text), tokenizer)) for text in texts)
    fitting = [*islice((pair for pair in asked if len(pair[1]) <= context - count), prompts)]
    found, elsewhere, complaints = list[Reply](), list[str](), list[str]()
    bar = Progress("Chromium replies", len(fitting), "prompts")
    with serving(model.parent) as address, chromium() as browser, bar:
        page = browser.new_page()
        page.on("request", lambda it: None if it.url.startswith((address, *OWN)) else elsewhere.append(it.url))
        page.on("console", lambda it: complaints.append(it.text) if it.type in ("error", "warning") else None)
        page.on("pageerror", lambda it: complaints.append(str(it)))
        page.goto(address)
        for text, _ in fitting:
            found.append(page.evaluate(ASK.read_text("utf-8"), [text, count]))
            bar.advance()
    yield Check("requests to elsewhere", "none", ", ".join(elsewhere) or "none", not elsewhere)
    yield Check("complaints of the browser", "none", "; ".join(complaints) or "none", not complaints)
    tolerance = verify.TOLERANCE if dtype == "f32" else ROUNDED
    yield from compare_replies(found, [ids for _, ids in fitting], model, bundle, count, tolerance)


def compare_replies(
    found: Sequence[Reply], begun: Sequence[Ids], model: Path, bundle: Bundle, count: int, tolerance: float
) -> Iterator[Check]:
    """Whether each token that the browser drew after a prompt, and the end, is llama.cpp's most likely one there."""
    ends, end = reply_ends(bundle.tokenizer), bundle.tokenizer.mark_id(END)
    drawn = [[token for token, _ in tokens] + [end] * (finish == "stop") for tokens, finish in found]
    scored = [[*prompt, *ids] for prompt, ids in zip(begun, drawn, strict=True)]
    scores = ask_llama_cpp(model, scored=scored, threads=torch.get_num_threads())["scores"]
    gaps, differences = list[float](), [0.0]
    for prompt, (tokens, finish), seen in zip(begun, found, scores, strict=True):
        gap, logprobs = (some[len(prompt) - 1 :] for some in (seen.highest - seen.logit, seen.logit - seen.log_total))
        if finish == "stop" and int(seen.top[-1]) in ends:
            gap[-1] = 0.0  # it ends with another mark
        gaps.append(gap.max().item() if len(gap) else 0.0)
        differences += [abs(mine - theirs) for mine, (_, theirs) in zip(logprobs.tolist(), tokens, strict=False)]
    same = f"{gaps.count(0):,} of {len(gaps):,} replies equal"
    if max(gaps) > 0:
        same += f"; the others differ where the two most likely tokens are at most {max(gaps):.1g} apart"
    cut = [finish for _, finish in found if finish not in ("stop", "length")]
    if cut:
        same += f"; {len(cut)} cut short: {' '.join(sorted(set(cut)))}"
    wanted, holds = f"all equal, but for ties up to {tolerance:g}", max(gaps) <= tolerance and 2 * len(cut) < len(found)
    yield Check(f"greedy replies of {count} tokens", wanted, same, holds)
    wanted, greatest = f"at most {tolerance:g}", max(differences)
    yield Check("difference of a log-probability", wanted, f"{greatest:.2g}", greatest <= tolerance)
