"""The chat page in headless Chromium, as a new user would use it, with screenshots.

    page_test.py FEWBIT MODEL [FOLDER FOR SCREENSHOTS]
"""

import json
import os
import shutil
import sys
from pathlib import Path

from playwright.sync_api import expect, sync_playwright

from common import Server

MARKDOWN = """# A heading

Some **bold**, *emphasis*, `code <b>`, ~~gone~~ and [a link](https://example.org/a_(b)).
A [trap](javascript:alert(1)), <img src=x onerror=alert(2)>, <script>alert(3)</script> and ![pic](https://example.org/p.png).

1. one
2. two
   - deep **bold**
   - deeper

| left | right |
|:-----|------:|
| 1    | `a`   |
| 2    | <i>3</i> |

> said
> so

```python
def f(x):
    return "<b>" * x  # **not bold**
```

---

The end. snake_case_word and 2 * 3 * 4
"""


def stream_of(*texts):
    """A stream of one answer in these pieces."""
    chunks = [{"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]} for text in texts]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"


class Page:
    """A page of the server, and what a person does there."""

    def __init__(self, browser, url, folder, **options):
        self.url, self.folder = url, folder
        self.context = browser.new_context(viewport={"width": 1200, "height": 800}, reduced_motion="reduce", **options)
        self.page = self.context.new_page()
        self.problems, self.elsewhere = [], []
        self.page.on("dialog", lambda dialog: (self.problems.append(f"dialog {dialog.message}"), dialog.dismiss()))
        self.page.on("pageerror", lambda error: self.problems.append(f"error {error}"))
        self.page.on("request", self.note)
        self.page.goto(url)

    def note(self, request):
        if not request.url.startswith((self.url, "data:", "blob:")):
            self.elsewhere.append(request.url)

    def say(self, text):
        self.page.get_by_label("Message", exact=True).fill(text)
        self.page.keyboard.press("Enter")

    def answers(self):
        return self.page.locator(".message.assistant")

    def wait_for_answer(self):
        expect(self.page.get_by_role("button", name="Send")).to_be_visible(timeout=60_000)

    def shot(self, name):
        self.page.screenshot(path=self.folder / f"{name}.png")

    def instead(self, body, status=200):
        """Answers the next message with `body` in the server's place."""
        kind = "text/event-stream" if status == 200 else "application/json"
        self.page.route("**/v1/chat/completions", lambda route: route.fulfill(status=status, content_type=kind, body=body))

    def settings(self, **fields):
        self.page.get_by_role("button", name="Settings").click()
        for name, value in fields.items():
            field = self.page.locator(f"#settings [name={name}]")
            field.select_option(value) if name == "theme" else field.fill(str(value))
        self.page.get_by_role("button", name="Done").click()


def first_conversation(page):
    expect(page.page.get_by_text("Ask ")).to_be_visible()
    page.shot("1-hello")
    page.settings(temperature=0, max_tokens=60)
    page.say("What is the capital of France?")
    expect(page.page.locator("#title")).to_have_text("What is the capital of France?")
    page.wait_for_answer()
    answer = page.answers().last
    assert len(answer.locator(".text").inner_text()) > 3
    expect(answer.locator(".note")).to_contain_text("tok/s")
    expect(answer.locator(".note")).to_contain_text("context")
    page.shot("2-answer")


def retry_and_edit(page):
    before = page.answers().last.locator(".text").inner_text()
    page.page.get_by_role("button", name="Retry").last.click()
    page.wait_for_answer()
    assert page.answers().last.locator(".text").inner_text() == before, "greedy answers are the same"
    assert page.answers().count() == 1
    # Arrow up edits the last message.
    page.page.get_by_label("Message", exact=True).focus()
    page.page.keyboard.press("ArrowUp")
    field = page.page.get_by_label("Edit the message")
    expect(field).to_have_value("What is the capital of France?")
    field.fill("Name three fruits.")
    page.page.keyboard.press("Enter")
    page.wait_for_answer()
    expect(page.page.locator(".message.user .text")).to_have_text("Name three fruits.")
    assert page.answers().last.locator(".text").inner_text() != before
    # Escape leaves a message as it was.
    page.page.get_by_role("button", name="Edit").last.click()
    page.page.get_by_label("Edit the message").fill("nothing")
    page.page.keyboard.press("Escape")
    expect(page.page.locator(".message.user .text")).to_have_text("Name three fruits.")


def stop(page):
    page.settings(max_tokens=2000, temperature=1)
    page.say("Write a very long story about the sea.\nWith two lines.")
    expect(page.answers().last.locator(".text")).to_contain_text(" ", timeout=60_000)
    expect(page.page.get_by_role("button", name="Stop")).to_be_visible()
    page.page.keyboard.press("Escape")
    page.wait_for_answer()
    expect(page.answers().last).to_contain_text("Stopped.")
    page.settings(max_tokens=60, temperature=0)


def what_stays(page):
    title = page.page.locator("#title").inner_text()
    count = page.answers().count()
    page.page.reload()
    expect(page.page.locator("#title")).to_have_text(title)
    assert page.answers().count() == count
    page.page.get_by_role("button", name="Settings").click()
    expect(page.page.locator("#settings [name=max_tokens]")).to_have_value("60")
    expect(page.page.locator("#settings [name=top_p]")).to_have_attribute("placeholder", "0.95")
    page.shot("3-settings")
    page.page.keyboard.press("Escape")
    # A second conversation, by keyboard; the first can be opened again, and deleted.
    page.page.keyboard.press("Control+Shift+O")
    expect(page.page.get_by_text("Ask ")).to_be_visible()
    page.say("Hello")
    page.wait_for_answer()
    names = page.page.locator("#list .name")
    expect(names).to_have_count(2)
    names.nth(1).click()
    assert page.answers().count() == count
    page.page.get_by_label(f"Delete {title}").click()
    expect(names).to_have_count(1)
    expect(page.page.locator("#title")).to_have_text("Hello")


def markdown(page):
    page.page.keyboard.press("Control+Shift+O")
    page.instead(stream_of(*[MARKDOWN[i : i + 7] for i in range(0, len(MARKDOWN), 7)]))
    page.say("Show me Markdown. <b>bold?</b>")
    page.wait_for_answer()
    page.page.unroute("**/v1/chat/completions")
    log = page.page.locator("#log")
    expect(log.locator("h1")).to_have_text("A heading")
    expect(log.locator(".assistant strong").first).to_have_text("bold")
    expect(log.locator("em")).to_have_text("emphasis")
    expect(log.locator("p code").first).to_have_text("code <b>")
    expect(log.locator("del")).to_have_text("gone")
    expect(log.locator("ol > li")).to_have_count(2)
    expect(log.locator("ol ul > li")).to_have_count(2)
    expect(log.locator("td")).to_have_count(4)
    expect(log.locator("td").nth(3)).to_have_text("<i>3</i>")
    expect(log.locator("blockquote")).to_have_text("said so")
    expect(log.locator("pre code")).to_have_text('def f(x):\n    return "<b>" * x  # **not bold**')
    expect(log.locator("hr")).to_have_count(1)
    expect(log.locator("p").last).to_have_text("The end. snake_case_word and 2 * 3 * 4")
    # Nothing of it was taken for HTML, and the only links lead where they say.
    for name in ("img", "script", "b", "i", "iframe"):
        expect(log.locator(name)).to_have_count(0)
    links = log.locator("a").evaluate_all("links => links.map(link => [link.href, link.rel])")
    safe = "noopener noreferrer"
    assert links == [["https://example.org/a_(b)", safe], ["https://example.org/p.png", safe]], links
    page.shot("4-markdown")


def look(page):
    shade = "document.documentElement.matches('[data-theme=dark]') && getComputedStyle(document.body).backgroundColor"
    page.settings(theme="dark")
    assert page.page.evaluate(shade) == "rgb(22, 24, 29)"
    page.shot("5-dark")
    page.page.set_viewport_size({"width": 390, "height": 844})
    assert page.page.evaluate("document.documentElement.scrollWidth") <= 390, "nothing is wider than the phone"
    expect(page.page.locator("#side")).to_be_hidden()
    page.shot("6-phone")
    page.page.get_by_role("button", name="Conversations").click()
    expect(page.page.locator("#side")).to_be_visible()
    page.shot("7-phone-menu")
    page.page.locator("#list .name").last.click()
    expect(page.page.locator("#side")).to_be_hidden()
    page.page.set_viewport_size({"width": 1200, "height": 800})


def trouble(page):
    page.instead(json.dumps({"error": {"message": "256 texts are waiting already; try again later"}}), 429)
    page.say("Are you busy?")
    page.wait_for_answer()
    expect(page.answers().last).to_contain_text("256 texts are waiting already")
    page.page.unroute("**/v1/chat/completions")
    page.page.get_by_role("button", name="Retry").last.click()
    page.wait_for_answer()
    expect(page.answers().last).not_to_contain_text("waiting already")
    page.instead('data: {"choices": [{"delta": {"content": "half"}}]}\n\n')
    page.say("And now?")
    page.wait_for_answer()
    expect(page.answers().last).to_contain_text("The connection broke off.")
    page.page.unroute("**/v1/chat/completions")


def with_a_key(browser, binary, model, folder):
    with Server(binary, model, "--api-key", "secret") as server:
        page = Page(browser, server.url, folder)
        expect(page.page.locator("#settings")).to_be_visible()
        page.page.locator("#settings [name=key]").fill("secret")
        page.page.get_by_role("button", name="Done").click()
        expect(page.page.get_by_text("Ask ")).to_be_visible()
        page.settings(max_tokens=10)
        page.say("Hello")
        page.wait_for_answer()
        expect(page.answers().last.locator(".note")).to_contain_text("tokens")
        assert not page.problems, page.problems


def main(binary, model, folder="scratch/page"):
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if not chromium:
        sys.exit("page_test.py needs Chromium (Debian: apt-get install chromium)")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    steps = [first_conversation, retry_and_edit, stop, what_stays, markdown, look, trouble]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        with Server(binary, model) as server:
            page = Page(browser, server.url, folder, color_scheme="light")
            for step in steps:
                try:
                    step(page)
                except BaseException:
                    page.shot("failed")
                    raise
                print(f"{step.__name__}: ok", flush=True)
            assert not page.problems, page.problems
            assert not page.elsewhere, page.elsewhere
        with_a_key(browser, binary, model, folder)
        browser.close()
    print(f"{len(steps) + 1} passed, 0 failed; screenshots in {folder}")


if __name__ == "__main__":
    main(*sys.argv[1:])
