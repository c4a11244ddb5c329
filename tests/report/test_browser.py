"""The page of a run works in a real browser, for every reader."""

import pytest

from nanollm.report.folder import read_run
from nanollm.report.page import render

RULES = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"]}


@pytest.fixture
def open_page(browser, tmp_path):
    """open_page(runs, **context): their page from the disk, which must ask for nothing and complain of nothing."""
    complaints, contexts = [], []

    def visit(*folders, **context):
        path = tmp_path / "page.html"
        path.write_text(render([read_run(folder) for folder in folders]), encoding="utf-8")
        contexts.append(browser.new_context(bypass_csp=True, **context))  # for axe alone: the page has no script
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda entry: complaints.append(entry.text))
        page.on("request", lambda request: complaints.append(request.url) if request.url != path.as_uri() else None)
        page.goto(path.as_uri())
        return page

    yield visit
    for context in contexts:
        context.close()
    assert [each for each in complaints if not each.startswith("data:")] == []


@pytest.mark.long
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everybody_can_read_it(scheme, open_page, write_run, grpo_run):
    """WCAG 2.1 AA, contrast among it, as axe-core checks it."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install axe-playwright-python")
    page = open_page(write_run(), grpo_run, color_scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    found = axe.Axe().run(page, options=RULES)
    assert [(each["id"], each["nodes"][0]["html"][:200]) for each in found.response["violations"]] == []


def test_what_a_model_wrote_is_text(open_page, write_run, grpo_run):
    page = open_page(write_run(), grpo_run)
    assert page.title() == "run and grpo"
    assert page.locator("dd b, dd img, dd script").count() == 0


def test_the_keyboard_alone_reaches_and_opens_everything(open_page, write_run):
    page = open_page(write_run())
    wanted = page.locator("a[href], summary, [tabindex='0']:visible").count()
    reached = set()
    for _ in range(wanted + 2):
        page.keyboard.press("Tab")
        place = page.evaluate("[...document.querySelectorAll('*')].indexOf(document.activeElement)")
        reached.add(place)
        assert page.evaluate("document.activeElement.matches('body, :focus-visible')")
    assert len(reached - {page.evaluate("[...document.querySelectorAll('*')].indexOf(document.body)")}) == wanted
    page.locator("figure summary").first.focus()
    page.keyboard.press("Enter")
    assert page.locator("figure table").first.is_visible()


def test_it_fits_a_telephone_and_prints(open_page, write_run):
    page = open_page(write_run(), viewport={"width": 360, "height": 640})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.pdf()[:5] == b"%PDF-"
