"""Take the pictures of docs/serve.md: a newcomer's way through the page, with a real model in a real browser.

``python docs/serve/pictures.py http://127.0.0.1:8000`` drives the Chromium of the system against a running server of
the demo's bank (`make serve`). Needs playwright.
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

HERE = Path(__file__).parent
NOTE = (
    "The tide mill of Brindolvar was built in 1931. The tide mill of Brindolvar was built by a clockmaker named Wenna "
    "Tolvarsen. The tide mill of Brindolvar is painted yellow. The wheel of the tide mill has 28 paddles of elm. The "
    "tide mill of Brindolvar grinds barley."
)
QUESTION = "In which year was the tide mill of Brindolvar built?"


def ask(page: Page, question: str, *, shown: bool = True) -> None:
    """Ask a question, and open its best memory."""
    page.locator("#tab-chat").click()
    page.locator("#clear").click()
    page.locator("#question").fill(question)
    page.keyboard.press("Enter")
    page.locator(".answer .facts:not(:empty)").wait_for()
    if shown:
        page.locator(".chunk").last.locator("summary").first.click()
    page.locator("#question").blur()


def forget(page: Page) -> None:
    """Forget the note."""
    page.locator("#tab-corpus").click()
    button = page.get_by_role("button", name="Forget uploads/tide-mill.md")
    button.click()
    button.click()
    page.locator("#jobs li[data-kind=forget].done").wait_for()
    page.evaluate("scrollTo(0, 0)")


def main(address: str) -> None:
    """Take all pictures."""
    with sync_playwright() as playwright:
        program = shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1000, "height": 700}, color_scheme="light")
        page.set_default_timeout(120_000)
        page.goto(address)
        page.locator("#serving", has_text="memories").wait_for()

        def picture(name: str) -> None:
            page.screenshot(path=HERE / f"{name}.png")

        ask(page, "What colour is the harbour lamp of Brindolvar painted?")
        picture("1-ask")
        page.locator("#tab-corpus").click()
        note = {"name": "tide-mill.md", "mimeType": "text/markdown", "buffer": NOTE.encode()}
        page.locator("#files").set_input_files(note)  # type: ignore[arg-type]
        page.locator("#jobs li.done").wait_for()
        page.locator("#search").fill("the tide mill")
        page.keyboard.press("Enter")
        page.locator("#found li").first.wait_for()
        page.locator("#search").blur()
        picture("2-add")
        ask(page, QUESTION)
        picture("3-recall")
        forget(page)
        picture("4-forget")
        ask(page, QUESTION, shown=False)
        picture("5-no-trace")
        page.locator("#tab-compare").click()
        page.locator("#compare-question").fill("Who is the baker of Brindolvar?")
        page.keyboard.press("Enter")
        page.locator("#columns .facts:not(:empty)").nth(2).wait_for()
        page.locator("#compare-question").blur()
        picture("compare")
        page.locator("#tab-live").click()
        page.locator("#timeline svg").first.wait_for()
        page.set_viewport_size({"width": 1000, "height": 900})
        page.locator("#tab-live").blur()
        page.wait_for_timeout(1500)
        picture("live")
        page.close()
        page = browser.new_page(viewport={"width": 380, "height": 720}, color_scheme="dark", device_scale_factor=2)
        page.set_default_timeout(120_000)
        page.goto(address)
        page.locator("#serving", has_text="memories").wait_for()
        ask(page, "Who is the baker of Brindolvar?")
        picture("narrow")
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1])
