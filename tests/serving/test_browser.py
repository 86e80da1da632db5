"""The chat page in a real browser: an adapter is picked, and its answer comes in pieces."""

import os
import shutil
import time
from pathlib import Path

import pytest

import lofit_fast as lf
from lofit_fast.evaluation.judge import generate_answers
from lofit_fast.models.load import load_model
from tests.oracle import randomize
from tests.serving.served_process import served

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")
pytestmark = pytest.mark.slow

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
PROMPT = "hello there"


@pytest.fixture(scope="module")
def browser():
    """Playwright's own browser, or one that is installed."""
    with playwright.sync_playwright() as driver:
        own = driver.chromium.executable_path
        found = own if os.path.exists(own) else next(filter(None, map(shutil.which, BROWSERS)), None)
        if found is None:
            pytest.skip("no browser: neither `playwright install chromium` nor chromium was run or installed")
        started = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield started
        started.close()


# on every piece that the page's answer grows by
WATCH = """
() => {
  window.seen = [];
  const note = () => window.seen.push(document.querySelector("[data-model=moved] .assistant")?.textContent ?? "");
  new MutationObserver(note).observe(document.getElementById("columns"),
    { childList: true, subtree: true, characterData: true });
}
"""


def open_page(browser, port):
    """The page, and what it has asked and complained of."""
    page, asked, errors = browser.new_page(viewport={"width": 1100, "height": 640}), [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.goto(f"http://127.0.0.1:{port}/")
    page.wait_for_selector("#models input")
    return page, asked, errors


def wait(page, holds, seconds=60):
    """Until an expression is true in the page, whose policy forbids playwright's own way to wait for that."""
    deadline = time.monotonic() + seconds
    while not page.evaluate(holds):
        assert time.monotonic() < deadline, page.inner_text("body")
        page.wait_for_timeout(50)


def expected(options, tokens):
    given = dict(zip(options[2::2], options[3::2], strict=True))
    folder = next(str(word).partition("=")[2] for word in options if str(word).startswith("moved="))
    assert given["--dtype"] == "float32"
    model, tokenizer = load_model(str(options[1]), dtype="float32", device="cpu")
    base, adapted = (generate_answers(model, tokenizer, [PROMPT], max_new_tokens=tokens)[0], None)
    lf.load(model, folder)
    adapted = generate_answers(model, tokenizer, [PROMPT], max_new_tokens=tokens)[0]
    assert base != adapted
    return base, adapted


def test_an_adapter_answers_beside_the_base(browser, options, tmp_path):
    tokens = 24
    base, adapted = expected(options, tokens)
    with served(*options) as (_, port):
        page, asked, errors = open_page(browser, port)
        # the base and the first adapter stand side by side; the second can be picked
        assert page.eval_on_selector_all("#models input", "all => all.map(box => [box.value, box.checked])") == [
            ["model", True],
            ["moved", True],
            ["scaled", False],
        ]
        page.select_option("#mode", "text")
        page.fill("#max_tokens", str(tokens))
        page.evaluate(WATCH)
        page.fill("#prompt", PROMPT)
        page.press("#prompt", "Enter")
        wait(page, "document.querySelectorAll('.assistant.cut').length === 2")
        said = {name: page.inner_text(f"[data-model={name}] .assistant") for name in ("model", "moved")}
        assert said == {"model": base.strip(), "moved": adapted.strip()} or said == {"model": base, "moved": adapted}
        # in pieces, each longer than the one before
        lengths = [len(text) for text in dict.fromkeys(page.evaluate("window.seen")) if text]
        assert lengths == sorted(lengths) and len(lengths) > 3
        # the second adapter alone, as a chat
        page.uncheck("#models input[value=model]")
        page.uncheck("#models input[value=moved]")
        page.check("#models input[value=scaled]")
        page.select_option("#mode", "chat")
        page.fill("#prompt", "and you")
        page.click("#send")
        page.wait_for_selector("[data-model=scaled] .assistant.cut")
        assert page.inner_text("[data-model=scaled] .assistant")
        # an error is shown, and the page goes on
        page.fill("#max_tokens", "1000000")
        page.fill("#prompt", "too much")
        page.click("#send")
        page.wait_for_selector("[data-model=scaled] .error")
        assert "do not fit the model's context" in page.inner_text("[data-model=scaled] .error")
        assert {address.split("/")[2] for address in asked} == {f"127.0.0.1:{port}"}
        # the refused request, which a browser notes by itself
        assert [text for text in errors if "400" not in text] == []


def test_stop_in_the_middle(browser, options):
    with served(*options) as (_, port):
        page, _, errors = open_page(browser, port)
        page.fill("#max_tokens", "50000")
        page.fill("#prompt", PROMPT)
        page.click("#send")
        wait(page, "document.querySelector('.assistant')?.textContent.length > 5")
        page.click("#stop")
        wait(page, "!document.getElementById('send').disabled")
        wait(page, "fetch('/health').then(r => r.json()).then(h => h.pending === 0)")
        assert errors == []


@pytest.mark.real
def test_the_picture_of_docs(browser, tmp_path):
    """Writes the picture into the folder that LOFIT_FAST_PICTURE names, if there is one."""
    try:
        model, _ = load_model("smollm2", dtype="float32", device="cpu")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    handle = lf.patch(model, lf.LofitConfig(offset=[(20, 3), (25, 1), (28, 7)]))
    randomize(handle, std=0.6)
    adapter = Path(os.environ.get("LOFIT_FAST_ADAPTER", str(handle.save(tmp_path / "drawn"))))
    name = adapter.parent.name if adapter.name == "adapter" else adapter.name
    given = ("--model", "smollm2", "--adapter", f"{name}={adapter}", "--dtype", "float32", "--device", "cpu")
    with served(*given) as (_, port):
        page, _, errors = open_page(browser, port)
        page.fill("#max_tokens", "48")
        page.fill("#prompt", "What is the capital of France?")
        page.press("#prompt", "Enter")
        wait(page, "document.getElementById('status').textContent === ''", 240)
        answers = page.eval_on_selector_all(".assistant", "all => all.map(p => p.textContent)")
        assert len(answers) == 2 and all(answers) and answers[0] != answers[1]
        assert "Paris" in answers[0] and errors == []
        if folder := os.environ.get("LOFIT_FAST_PICTURE"):
            page.screenshot(path=Path(folder) / "chat.png")
