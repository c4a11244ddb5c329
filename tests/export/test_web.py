"""An export for the web is a whole page: it replies in a browser as llama.cpp does, without help from elsewhere."""

import json
import re
from contextlib import nullcontext

import pytest

from nanollm import cli
from nanollm.bundle import load_bundle
from nanollm.export import web
from nanollm.stages.export import Config, run
from nanollm.text.chat import Conversation, encode_prompt
from tests.report.test_browser import RULES
from tests.serve.running import wait_until
from tests.stages.conftest import MODEL, untrained

DONE = ".exchange:last-child:not([data-status=waiting]):not([data-status=streaming])"
REPLY = ".exchange:last-child .reply > .text"
QUESTION = "Tom has 3 cups and 4 bowls. How many things are there?"
OLD_BROWSER = "delete WebAssembly.Suspending; delete WebAssembly.promising;"
OVER_HTTP = "delete globalThis.caches; delete Navigator.prototype.storage; delete Navigator.prototype.serviceWorker;"
NO_SIMD = "WebAssembly.validate = () => false;"
FOUR_CORES = "Object.defineProperty(Navigator.prototype, 'hardwareConcurrency', { get: () => 4 });"


@pytest.fixture(scope="module")
def bundle(tokenizer, tmp_path_factory):
    return untrained(tmp_path_factory.mktemp("untrained") / "bundle", MODEL, tokenizer)


@pytest.fixture
def packages(tmp_path):
    """A folder node_modules with files called as those of wllama."""
    for name, files in web.TAKEN.items():
        for path in files.values():
            file = tmp_path / "node_modules" / "@wllama" / name / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{name} {path}")
    return tmp_path / "node_modules"


@pytest.fixture
def complaint(bundle, tmp_path, capsys):
    """The one line that `nanollm export BUNDLE --format web --out tmp_path/out ...` gives; exit code 2 and no file."""

    def said(*words):
        capsys.readouterr()
        code = cli.main(["export", str(bundle), "--format", "web", "--out", str(tmp_path / "out"), *words])
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert code == 2 and not (tmp_path / "out").exists(), last
        return last

    return said


# --- what is written ---


def test_the_folder_holds_the_servers_page_the_engine_and_the_model(bundle, packages, tmp_path):
    folder = run(Config(bundle=bundle, format="web", wllama=packages, out=tmp_path / "out", name="tiny"))
    found = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
    page = {f"page/{file.name}" for file in web.PAGE.iterdir()} - {"page/index.html"}
    wllama = {f"wllama/{name}" for files in web.TAKEN.values() for name in files}
    own = {"index.html", "model.json", "offline.js", "tiny-Q8_0.gguf", "README.md", "provenance.json"}
    assert set(found) == page | wllama | own
    changed = {name for name in page if found[name].read_bytes() != (web.PAGE.parent / name).read_bytes()}
    assert changed == {"page/server.js"}
    lines = found["index.html"].read_text("utf-8").splitlines()
    assert [line for line in lines if "Content-Security-Policy" not in line] == (
        (web.PAGE / "index.html").read_text("utf-8").splitlines()
    )
    told = json.loads(found["model.json"].read_text("utf-8"))
    assert (told["id"], told["bytes"]) == ("tiny", found[told["file"]].stat().st_size)
    kept = json.loads(re.search(r"FILES = (.*);", found["offline.js"].read_text("utf-8"))[1].replace("'", '"'))
    assert {name.replace("./", "index.html") for name in kept} == (
        page | {"index.html", "model.json", "wllama/index.min.js"}
    )
    assert "python -m http.server" in found["README.md"].read_text("utf-8")


def test_another_engine_is_another_edition_so_that_no_browser_mixes_them(bundle, packages, tmp_path):
    editions = set()
    for words in ("old", "new"):
        (packages / "@wllama" / "wllama" / "esm" / "index.min.js").write_text(words)
        folder = run(Config(bundle=bundle, format="web", wllama=packages, out=tmp_path / words))
        editions.add(json.loads((folder / "model.json").read_text("utf-8"))["edition"])
    assert len(editions) == 2


def test_bad_input_costs_one_line_and_no_file(packages, complaint, monkeypatch, tmp_path):
    (packages / "@wllama" / "wllama" / "LICENCE").unlink()
    assert "LICENCE is missing; --wllama takes the folder node_modules that this fills: npm" in complaint(
        "--wllama", str(packages)
    )
    assert "--push needs a format for engines, got web" in complaint("--push", "ada/x")
    assert "--adapter needs --format compact or gguf, got web" in complaint("--adapter", "x")
    assert "--wllama needs --format web, got gguf" in complaint("--wllama", "x", "--format", "gguf")
    monkeypatch.setattr(web, "cache_folder", lambda: tmp_path)

    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        assert "run it where there are npm and a network, then give --wllama node_modules" in complaint()
    assert not [*tmp_path.glob("wllama-*")]
    monkeypatch.setattr(web, "MOST_BYTES", 1000)
    assert "choose a smaller --dtype" in complaint()
    monkeypatch.setattr(web, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match="pip install playwright && playwright install chromium"), web.chromium():
        pass


def test_what_npm_gives_must_have_the_checksum_that_is_known(complaint, monkeypatch, packages):
    monkeypatch.setattr(web, "cache_folder", lambda: packages.parent / "cache")
    kept = packages.parent / "cache" / f"wllama-{web.VERSION}"
    kept.mkdir(parents=True)
    packages.rename(kept / "node_modules")
    assert f"must have the sha256 {web.SHA256}, got" in complaint()


# --- in Chromium ---


@pytest.fixture(scope="module")
def page_of(trained, tmp_path_factory):
    """The folder of a page with the model that was really trained."""
    try:
        web.find_wllama(None)
    except ValueError as missing:
        pytest.skip(str(missing))
    out = tmp_path_factory.mktemp("page") / "web"
    return run(Config(bundle=trained, format="web", dtype="f32", out=out, name="tiny"))


@pytest.fixture
def visit(browser):
    """visit(address, script, **context): a page that asks for nothing from elsewhere and complains of nothing."""
    found, contexts = [], []

    def open_page(address, script="", **context):
        contexts.append(browser.new_context(**context))
        own = (address, "data:", "blob:")
        contexts[-1].on("request", lambda it: None if it.url.startswith(own) else found.append(it.url))
        page = contexts[-1].new_page()
        page.add_init_script(script)
        page.on("pageerror", lambda error: found.append(str(error)))
        page.on("console", lambda entry: found.append(entry.text) if entry.type in ("error", "warning") else None)
        page.goto(address)
        page.evaluate("localStorage.setItem('nanollm.settings', JSON.stringify({ temperature: 0, max_tokens: 24 }))")
        page.reload()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert found == []


def ask(page, question=QUESTION):
    """The reply in the page."""
    page.locator("#model-name", has_text="tiny").wait_for()
    page.fill("#message", question)
    page.keyboard.press("Enter")
    page.wait_for_selector(DONE)
    return page.locator(REPLY).text_content()


@pytest.mark.long
def test_a_reply_can_be_looked_into_and_the_page_is_there_without_a_network(page_of, visit):
    with web.serving(page_of) as address:
        page = visit(address)
        page.click("#inside")
        reply = ask(page)
        tokens = page.locator(".token")
        assert "".join(tokens.all_text_contents()).strip() == reply.strip() != ""  # llama.cpp strips a reply
        tokens.nth(1).click()
        assert page.locator(".other").count() == 5
        assert re.fullmatch(r".*%", page.locator(".panel .chosen .share").text_content())
        assert not page.locator(".cell").count()  # llama.cpp does not tell its experts
        there = "file => caches.match(new URL(file, document.baseURI)).then(Boolean)"
        for file in ("./", "wllama/wllama.wasm", "tiny-F32.gguf"):
            wait_until(lambda file=file: page.evaluate(there, file), 20)
    page.reload()
    page.click("#new")
    assert ask(page) == reply


@pytest.mark.long
def test_threads_older_browsers_and_http_change_nothing_in_a_reply(page_of, visit, monkeypatch):
    with web.serving(page_of) as address:
        expected = ask(visit(address))
        old = visit(address, OLD_BROWSER)
        assert ask(old) == expected
        loaded = old.evaluate("performance.getEntriesByType('resource').map(({ name }) => name)")
        assert [name for name in loaded if name.endswith(".wasm")] == [f"{address}wllama/compat.wasm"]
        insecure = visit(address, OVER_HTTP)
        assert ask(insecure) == expected
        assert insecure.evaluate("[typeof caches, typeof navigator.storage]") == ["undefined", "undefined"]
        send = web.Quiet.end_headers

        def isolated(handler):
            handler.send_header("Cross-Origin-Opener-Policy", "same-origin")
            handler.send_header("Cross-Origin-Embedder-Policy", "require-corp")
            send(handler)

        monkeypatch.setattr(web.Quiet, "end_headers", isolated)
        page = visit(address, FOUR_CORES)
        assert page.evaluate("crossOriginIsolated")
        assert ask(page) == expected


@pytest.mark.long
def test_on_a_phone_in_light_and_dark_everybody_can_read_it(page_of, visit):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install axe-playwright-python")
    with web.serving(page_of) as address:
        for scheme in ("light", "dark"):
            phone = {"viewport": {"width": 360, "height": 640}, "color_scheme": scheme, "bypass_csp": True}
            page = visit(address, **phone)  # the rules of its head would keep axe out
            page.click("#inside")
            ask(page)
            page.locator(".token").first.click()
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
            violations = axe.Axe().run(page, options=RULES).response["violations"]
            assert [(each["id"], each["nodes"][0]["html"][:200]) for each in violations] == []


@pytest.mark.long
def test_what_cannot_work_is_said_on_the_page(page_of, visit):
    with web.serving(page_of) as address:
        page = visit(address, NO_SIMD)
        assert page.locator("#examples").text_content() == (
            "This browser cannot run the model. It lacks WebAssembly with SIMD; a newer one has it."
        )
        page = visit(address)
        for question, title in (
            ("What does <|end|> mean?", "The model cannot be asked this."),
            ("too many words " * 300, "The conversation is too long for this model."),
        ):
            ask(page, question)
            assert page.locator(".exchange:last-child .trouble .title").text_content() == title
        assert ask(page)
        page.evaluate("localStorage.setItem('nanollm.settings', JSON.stringify({ schema: '{}' }))")
        page.reload()
        ask(page)
        assert "no reply follows a JSON schema" in page.locator(".exchange:last-child .trouble .advice").text_content()


@pytest.mark.long
def test_the_proof_holds_and_finds_a_token_that_llama_cpp_would_not_draw(
    page_of, trained, browser, with_llama, monkeypatch
):
    monkeypatch.setattr(web, "chromium", lambda: nullcontext(browser))
    bundle, model = load_bundle(trained), page_of / "tiny-F32.gguf"
    checks = list(web.compare_in_browser(model, bundle, "f32", 3))
    assert [check.what for check in checks if not check.holds] == []
    prompt = encode_prompt(Conversation.of(QUESTION), bundle.tokenizer)
    drawn = ([(bundle.tokenizer.unk_id, -0.5)], "length")
    checks = list(web.compare_replies([drawn], [prompt], model, bundle, 1, 1e-4))
    assert [check.holds for check in checks] == [False, False]
    checks = list(web.compare_replies([([], "The model could not answer.")], [prompt], model, bundle, 1, 1e-4))
    assert [check.holds for check in checks] == [False, True]
