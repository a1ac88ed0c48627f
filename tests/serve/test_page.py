"""The page in a real browser: a person asks, sees the memory, adds a document, asks about it, and has it forgotten."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.end_to_end.commands import Place
from tests.end_to_end.conftest import model_path, new_place, written, written_once  # noqa: F401 - fixtures
from tests.serve.corpus_server import serving

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Route

NOTE = "The weathercock of Pellworm turns to the north before a storm."
QUESTION = "What does the weathercock of Pellworm do before a storm?"

MEMORY = {"id": 0, "score": 0.5, "source": "a.md", "heading": "", "text": "a", "start_index": 0}


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("there is no Chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def shared(written_once: Place) -> Iterator[str]:  # noqa: F811
    """The address of a server whose bank stays as it is."""
    with serving(written_once.file) as url:
        yield url


@pytest.fixture(scope="module")
def locked(written_once: Place, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:  # noqa: F811
    """The address of a server with keys. It has a bank of its own, since a process opens one but once."""
    folder = shutil.copytree(written_once.folder, tmp_path_factory.mktemp("locked") / "place")
    with serving(folder / "m3.yaml", "read reader-key, read narrow-key facts/wall.html") as url:
        yield url


@contextmanager
def opened(browser: "Browser", url: str, **options: object) -> "Iterator[Page]":
    """The page, which must have no error and ask no other site."""
    page = browser.new_page(**{"viewport": {"width": 1100, "height": 760}, **options})  # type: ignore[arg-type]
    page.set_default_timeout(200_000)  # machines may be busy
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda one: wrong.append(one.text) if "Content Security" in one.text else None)
    page.on("request", lambda one: None if one.url.startswith(url.partition("#")[0]) else wrong.append(one.url))
    page.goto(url)
    yield page
    page.close()
    assert wrong == []


def ask(page: "Page", question: str) -> list[str]:
    """Ask by the keyboard. Returns the sources of the memories that were read."""
    before = page.locator(".answer").count()
    page.locator("#question").fill(question)
    page.keyboard.press("Enter")
    page.locator(".answer").nth(before).locator(".facts:not(:empty)").wait_for()
    return page.locator(".answer").nth(before).locator(".source").all_inner_texts()


def streaming(body: str) -> "Callable[[Route], None]":
    """Answers a request of the page with this stream of events, in place of the server."""
    return lambda route: route.fulfill(body=body, content_type="text/event-stream")


def test_the_whole_way(browser: "Browser", written: Place) -> None:  # noqa: F811
    (written.folder / "cock.md").write_text(NOTE)
    with serving(written.file, metrics__timeline="100") as url, opened(browser, url) as page:
        page.locator("#serving", has_text="6 memories").wait_for()

        assert "facts/ferry.md" in ask(page, "How long does the crossing of the ferry to Brannoch take?")
        memory = page.locator(".answer .chunk details", has_text="facts/ferry.md").first
        memory.locator("summary").click()
        assert "55 minutes" in memory.locator("blockquote").inner_text()
        assert "uploads/cock.md" not in ask(page, QUESTION)

        page.locator("#tab-corpus").click()
        page.locator("#files").set_input_files(written.folder / "cock.md")
        page.locator("#jobs li.done", has_text="1 memory written").wait_for()
        page.locator("#serving", has_text="7 memories").wait_for()
        page.locator("#search").fill("weathercock")
        page.keyboard.press("Enter")
        assert page.locator("#found .source").first.inner_text() == "uploads/cock.md"
        page.locator("#paste summary").click()
        page.locator("#paste-name").fill("cock.md")
        page.locator("#paste-text").fill(f"{NOTE} It is made of tin.")
        page.get_by_role("button", name="Remember").click()
        page.locator("#jobs li.done", has_text="1 memory written").nth(1).wait_for()
        page.locator("#tab-chat").click()
        assert "uploads/cock.md" in ask(page, QUESTION)

        page.locator("#tab-live").click()
        page.locator("#tiers td", has_text="lmdb").wait_for()
        page.locator("#timeline svg rect").first.wait_for()

        page.locator("#tab-corpus").click()
        forget = page.get_by_role("button", name="Forget uploads/cock.md")
        forget.click()
        assert page.locator("#jobs li[data-kind=forget]").count() == 0  # it asks first
        forget.click()
        page.locator("#jobs li[data-kind=forget].done", has_text="1 memory forgotten").wait_for()
        page.locator("#found .source").first.wait_for()
        assert "uploads/cock.md" not in page.locator("#found").inner_text()
        page.locator("#tab-chat").click()
        page.locator("#clear").click()
        assert "uploads/cock.md" not in ask(page, QUESTION)
        assert "weathercock turns" not in page.locator("#talk").inner_text()
        assert not (written.folder / "uploads/cock.md").exists()


def test_the_same_question_three_times(browser: "Browser", shared: str) -> None:
    with opened(browser, f"{shared}/#compare") as page:
        page.locator("#compare-question").fill("Where do seventeen herons nest?")
        page.keyboard.press("Enter")
        page.locator("#columns .facts:not(:empty)").nth(2).wait_for()
        memory, text, nothing = page.locator("#columns .answer").all()
        assert "facts/birds.jsonl:herons" in memory.locator(".source").all_inner_texts()
        first = memory.locator(".chunk").first  # recalled by the question
        assert text.locator(".source").all_inner_texts() == first.locator(".source").all_inner_texts() != []
        assert nothing.locator(".source").count() == 0
        of_all = "lists => lists.map(one => getComputedStyle(one).listStyleType)"
        assert set(page.locator("#columns ol").evaluate_all(of_all)) == {"none"}  # all are shown alike
        tokens = [re.search(r"(\d+) tokens of the prompt", one.inner_text()) for one in (text, nothing)]
        assert tokens[0]
        assert tokens[1]
        assert int(tokens[0][1]) > int(tokens[1][1])  # the references are in the prompt


def test_a_memory_stands_with_its_part_of_an_answer(browser: "Browser", shared: str) -> None:
    def memory(start: int) -> dict[str, object]:
        return {"choices": [{"delta": {"memories": [{**MEMORY, "id": start, "start_index": start}]}}]}

    said = [{"choices": [{"delta": {"content": text}}]} for text in ("🦉🦉 owls", "🦭 seals")]
    none = {"choices": [{"delta": {"memories": []}}]}
    events = [memory(0), said[0], memory(7), said[1], none, said[1]]
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    with opened(browser, shared) as page:
        page.route("**/v1/chat/completions", streaming(body))
        ask(page, "owls?")
        assert page.locator(".chunk h3").all_inner_texts() == ["for “🦉🦉 owls”", "for “🦭 seals”"]


def test_an_answer_that_is_not_grounded_says_so(browser: "Browser", shared: str) -> None:
    with opened(browser, shared) as page:
        for told, shown in (({"grounded": False}, 1), ({"grounded": True}, 0), ({}, 0)):
            page.locator("#clear").click()
            deltas = [{"memories": [MEMORY]}, {"content": "owls"}, {"found": True, **told}]
            body = "".join(f"data: {json.dumps({'choices': [{'delta': delta}]})}\n\n" for delta in deltas)
            page.unroute_all()
            page.route("**/v1/chat/completions", streaming(f"{body}data: [DONE]\n\n"))
            ask(page, "owls?")
            assert page.locator(".answer", has_text="Not grounded").count() == shown


def test_a_key_is_asked_for_and_kept_in_the_tab(browser: "Browser", locked: str) -> None:
    with opened(browser, locked) as page:
        dialog = page.get_by_role("dialog")
        for key in ("another-key", "reader-key"):
            dialog.locator("#key").fill(key)
            page.keyboard.press("Enter")
            if key == "another-key":
                dialog.get_by_text("not known here").wait_for()
        page.locator("#serving", has_text="6 memories").wait_for()
        page.reload()
        page.locator("#serving", has_text="6 memories").wait_for()
        assert not dialog.is_visible()
        page.locator("#tab-corpus").click()
        page.locator("#files").set_input_files({"name": "a.md", "mimeType": "text/markdown", "buffer": NOTE.encode()})
        page.locator("#jobs li.failed", has_text="may only read").wait_for()
        assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
        with opened(browser, locked) as other:  # another tab, with a key for one source
            other.get_by_role("dialog").locator("#key").fill("narrow-key")
            other.keyboard.press("Enter")
            other.locator("#serving", has_text="tiny-llama").wait_for()
            assert set(ask(other, "Who built the northern wall, and where do herons nest?")) == {"facts/wall.html"}


def test_narrow_screens_and_the_keyboard(browser: "Browser", shared: str) -> None:
    narrow = {"viewport": {"width": 360, "height": 640}, "color_scheme": "dark"}
    with opened(browser, shared, **narrow) as page:
        page.locator("#serving", has_text="6 memories").wait_for()
        ask(page, "Where do seventeen herons nest?")
        page.locator("#tab-chat").focus()
        for name in ("compare", "corpus", "live", "chat"):
            page.keyboard.press("ArrowRight")
            page.locator(f"#{name}").wait_for()
            assert page.evaluate("document.activeElement.id") == f"tab-{name}"
            page.wait_for_timeout(100)
            assert page.evaluate("document.documentElement.scrollWidth") <= 360
        unnamed = page.evaluate(
            "[...document.querySelectorAll('input, textarea')].filter(one => !one.labels.length).map(one => one.id)"
        )
        assert unnamed == []


def test_documents_cannot_script_the_page(browser: "Browser", shared: str) -> None:
    hostile = "<img src=x onerror=alert(1)> <script>alert(2)</script> weathercock"
    found = json.dumps({"data": [{"id": 1, "score": 0.5, "source": hostile, "heading": hostile, "text": hostile}]})
    with opened(browser, f"{shared}/#corpus") as page:
        page.route("**/v1/corpus/search", lambda route: route.fulfill(body=found, content_type="application/json"))
        page.locator("#paste summary").click()
        page.locator("#paste-name").fill("<b>bold")
        page.locator("#paste-text").fill(hostile)
        page.get_by_role("button", name="Remember").click()
        page.locator("#jobs li.failed", has_text="Adding <b>bold").wait_for()  # no such name
        page.locator("#search").fill("weathercock")
        page.keyboard.press("Enter")
        for part in ("blockquote", ".source", ".heading"):
            assert page.locator(f"#found {part}").first.inner_text() == hostile
        assert page.locator("#found img, #jobs b").count() == 0


def test_the_files_of_the_page(locked: str) -> None:
    with httpx.Client(base_url=locked) as client:
        page = client.get("/")
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        for needed in ("default-src 'none'", "script-src 'self'", "frame-ancestors 'none'"):
            assert needed in page.headers["content-security-policy"]
        assert not re.search(r"https?://|<style|<script>|style=|onclick=", page.text)
        for path in re.findall(r'(?:src|href)="(/assets/[^"]+)"', page.text):
            assert client.get(path).status_code == 200
        script = client.get("/assets/main.js")
        assert script.headers["content-type"].startswith("text/javascript")
        again = client.get("/assets/main.js", headers={"If-None-Match": script.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        for path in ("/assets/nothing.js", "/assets/../page.py", "/assets/%2e%2e/page.py", "/assets/"):
            assert client.get(path).status_code in (401, 404)
