"""The chat in a real browser: Chromium, a real page, a real model."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chatting import CHROMIUM, Chat, chat, server_that_says

playwright = pytest.importorskip("playwright.sync_api")
axe = pytest.importorskip("axe_playwright_python.sync_playwright")
expect = playwright.expect
pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; make tools installs it, or says how"),
]
LONG = "Write a very long story about the sea."


@pytest.fixture(scope="module")
def models(tiny_model: Path, smollm2_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model that speaks and one that is quick."""
    folder = tmp_path_factory.mktemp("offer")
    for source in (smollm2_model, tiny_model):
        shutil.copytree(source, folder / source.name)
    return folder


@pytest.fixture(scope="module")
def running(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chat]:
    speaking, quick = models / "smollm2-int8", models / "tiny-int8"
    options = ("--greedy", "--max-new-tokens", "48")
    with chat(speaking, quick, *options, data=tmp_path_factory.mktemp("data")) as found:
        yield found


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with playwright.sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Tab:
    """A browser tab with the chat."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        self.context = browser.new_context(viewport={"width": 1280, "height": 900}, **options)
        self.page = self.context.new_page()
        self.errors: list[str] = []
        self.page.on("console", lambda each: self.errors.append(each.text) if each.type == "error" else None)
        self.page.on("pageerror", lambda each: self.errors.append(str(each)))
        self.page.goto(url)
        self.question = self.page.get_by_label("Your question").first
        self.answers = self.page.locator("#chat .bot.message")
        self.ready()

    def ready(self, text: str = "") -> None:
        """Wait until the engine is loaded."""
        expect(self.page.locator("#status .state.ready")).to_contain_text(text, timeout=60_000)

    def ask(self, text: str) -> None:
        """Type a question and send it."""
        self.question.fill(text)
        self.question.press("Enter")

    def finished(self) -> str:
        """Wait for the end of the last answer; returns its text, figures included."""
        expect(self.answers.last).to_contain_text(re.compile(r" tokens ·|stopped"), timeout=60_000)
        return str(self.answers.last.inner_text())

    def press(self, name: str) -> None:
        """Press a button."""
        self.page.get_by_role("button", name=name, exact=True).first.click()

    def unfold(self, name: str) -> None:
        """Open a part of the side column."""
        self.page.get_by_role("button", name=name).first.click()

    def reload(self) -> None:
        """Load the page again."""
        self.page.reload()
        self.ready()


@pytest.fixture
def tabs(chromium: Any) -> Iterator[Callable[..., Tab]]:
    """Opens tabs; in none of them may the console show an error."""
    opened: list[Tab] = []

    def open_(url: str, **options: Any) -> Tab:
        opened.append(Tab(chromium, url, **options))
        return opened[-1]

    yield open_
    errors = [error for tab in opened for error in tab.errors]
    for tab in opened:
        tab.context.close()
    assert errors == []


def test_a_question_is_answered_and_found_again_after_reload(running: Chat, tabs: Callable[..., Tab]) -> None:
    tab = tabs(running.url)
    tab.ask("What is the capital of France?")
    answer = tab.finished()
    assert "Paris" in answer
    assert re.search(r"first token \d+\.\d\d s · [\d.]+ tokens/s · \d+ tokens · CPU · int8", answer)
    expect(tab.page.locator("#gauge")).to_contain_text("of 8,192 tokens")
    tab.reload()
    expect(tab.answers.last).to_contain_text("Paris")


def test_stop_regenerate_edit_and_undo(running: Chat, tabs: Callable[..., Tab]) -> None:
    tab = tabs(running.url)
    tab.ask("Say hello.")
    tab.finished()
    tab.page.get_by_label("Retry").last.click()
    expect(tab.answers.last).not_to_contain_text("tokens ·", timeout=20_000)
    tab.finished()
    assert tab.answers.count() == 1
    tab.page.get_by_label("Edit").first.click()
    tab.page.locator("#chat textarea").fill("What is the capital of France?")
    tab.page.get_by_label("Submit").first.click()
    expect(tab.answers.last).to_contain_text("Paris", timeout=60_000)
    tab.finished()
    expect(tab.page.locator("#chat .user.message")).to_have_count(1)
    tab.page.get_by_label("Undo").last.click()
    expect(tab.page.locator("#chat .user.message")).to_have_count(0)
    expect(tab.question).to_have_value("What is the capital of France?")


def test_stop_ends_the_answer_soon(running: Chat, tabs: Callable[..., Tab]) -> None:
    tab = tabs(running.url)
    tab.unfold("Sampling")
    tab.page.get_by_label("number input for Longest answer, tokens").fill("4096")
    tab.page.get_by_label("number input for Longest answer, tokens").press("Tab")
    tab.ask(LONG)
    expect(tab.answers.last).to_contain_text(re.compile(r"\w+ \w+ \w+ \w+"), timeout=60_000)
    begun = time.monotonic()
    tab.press("Stop")
    expect(tab.answers.last).to_contain_text("stopped", timeout=5_000)
    assert time.monotonic() - begun < 3
    tab.ask("What is the capital of France?")
    expect(tab.answers).to_have_count(2, timeout=20_000)
    tab.press("Stop")
    tab.finished()


def test_two_tabs_never_mix_and_tell_the_place_in_the_line(running: Chat, tabs: Callable[..., Tab]) -> None:
    first, second = tabs(running.url), tabs(running.url)
    first.ask("Count: one, two, three, four, five, six, seven")
    second.ask("Alphabet: alpha, beta, gamma, delta")
    expect(second.answers.last).to_contain_text(re.compile(r"1 before you|tokens ·"))
    first.finished(), second.finished()
    assert first.page.locator("#chat .user.message").all_inner_texts()[0].startswith("Count")
    assert second.page.locator("#chat .user.message").all_inner_texts()[0].startswith("Alphabet")
    assert first.answers.count() == second.answers.count() == 1


def test_a_closed_tab_frees_its_generation(running: Chat, tabs: Callable[..., Tab]) -> None:
    leaving, staying = tabs(running.url), tabs(running.url)
    leaving.unfold("Sampling")
    leaving.page.get_by_label("number input for Longest answer, tokens").fill("4096")
    leaving.page.get_by_label("number input for Longest answer, tokens").press("Tab")
    leaving.ask(LONG)
    expect(leaving.answers.last).to_contain_text(re.compile(r"\w+ \w+ \w+"), timeout=60_000)
    leaving.page.close()
    begun = time.monotonic()
    staying.ask("What is the capital of France?")
    staying.finished()
    assert time.monotonic() - begun < 15


def test_the_device_is_changed_and_the_conversation_stays(running: Chat, tabs: Callable[..., Tab]) -> None:
    tab = tabs(running.url)
    tab.ask("What is the capital of France?")
    tab.finished()
    tab.unfold("Model and device")
    expect(tab.page.locator(".absent")).to_contain_text("NPU: not in this machine")
    tab.page.get_by_label("NPU-EMULATED").check()
    tab.press("Load")
    expect(tab.page.locator("#status .state.loading")).to_contain_text(re.compile(r", \d+ s"))
    tab.ready("emulated NPU")
    assert "Paris" in tab.answers.last.inner_text()
    tab.ask("And of Italy?")
    expect(tab.answers).to_have_count(2, timeout=20_000)
    assert "emulated NPU" in tab.finished()
    tab.page.get_by_label("CPU –").check()
    tab.press("Load")
    tab.ready("on CPU")


def test_a_dead_engine_is_told_and_comes_back(running: Chat, tabs: Callable[..., Tab]) -> None:
    tab = tabs(running.url)
    running.engine().kill()
    state = tab.page.locator("#status .state.dead")
    expect(state).to_contain_text("The engine is down: the engine ended with SIGKILL (out of memory?)", timeout=10_000)
    tab.ask("What is the capital of France?")
    expect(tab.answers.last).to_contain_text("the engine ended with SIGKILL")
    tab.press("Start the engine again")
    tab.ready()
    tab.page.get_by_label("Retry").last.click()
    assert "Paris" in tab.finished()


def test_conversations_are_named_listed_exported_imported_and_deleted(
    running: Chat, tabs: Callable[..., Tab], tmp_path: Path
) -> None:
    tab = tabs(running.url)
    tab.ask("Say hello.")
    tab.finished()
    tab.unfold("Export and import")
    tab.page.get_by_label("Name of this conversation").fill("A greeting")
    tab.page.get_by_label("Name of this conversation").press("Enter")
    expect(tab.page.get_by_label("Conversations").first).to_have_value("A greeting")
    with tab.page.expect_download() as download:
        tab.press("Export as JSON")
    exported = tmp_path / download.value.suggested_filename
    download.value.save_as(exported)
    assert exported.name == "A-greeting.json"
    fields = json.loads(exported.read_text(encoding="utf-8"))
    assert fields["messages"][0]["content"] == "Say hello."
    with tab.page.expect_download() as download:
        tab.press("Export as Markdown")
    download.value.save_as(tmp_path / "out.md")
    assert (tmp_path / "out.md").read_text(encoding="utf-8").startswith("# A greeting")
    tab.press("Delete")
    expect(tab.answers).to_have_count(0)
    with tab.page.expect_file_chooser() as chooser:
        tab.press("Import JSON")
    chooser.value.set_files(exported)
    expect(tab.page.locator("#chat .user.message")).to_contain_text("Say hello.")
    bad = tmp_path / "bad.json"
    bad.write_text("[1]")
    with tab.page.expect_file_chooser() as chooser:
        tab.press("Import JSON")
    chooser.value.set_files(bad)
    expect(tab.page.get_by_text("message 1 needs a role")).to_be_visible()


EVIL = (
    "Look: <script>window.hurt=1</script> <img src=x onerror='window.hurt=2'> <b>bold?</b> "
    "![spy](http://198.51.100.7/spy.png) <svg onload=window.hurt=3></svg> [link](javascript:window.hurt=4) "
    "<iframe src='http://198.51.100.7/'></iframe>\n\n```html\n<script>window.hurt=5</script>\n```\n"
)


def test_a_models_text_is_inert(chromium: Any, tabs: Callable[..., Tab], tmp_path: Path) -> None:
    with server_that_says(EVIL) as url, chat("--url", url, data=tmp_path) as remote:
        tab = tabs(remote.url)
        asked: list[str] = []
        tab.page.on("request", lambda each: asked.append(each.url))
        tab.ask("<img src=x onerror='window.hurt=6'>")
        answer = tab.finished()
        assert "<script>window.hurt=1</script>" in answer
        assert "<b>bold?</b>" in answer
        assert "<script>window.hurt=5</script>" in answer
        tab.page.wait_for_timeout(500)
        assert tab.page.evaluate("window.hurt") is None
        assert tab.page.locator("#chat").locator("script, img, svg[onload], iframe, [href^='javascript']").count() == 0
        assert {re.match(r"\w+:(//[^/]+)?", each)[0] for each in asked} <= {remote.url, "blob:", "data:"}  # type: ignore[index]
        expect(tab.page.locator("#status")).to_contain_text("parrot at http://127.0.0.1")


def test_no_serious_accessibility_violation(running: Chat, tabs: Callable[..., Tab]) -> None:
    for scheme in ("light", "dark"):
        tab = tabs(running.url, color_scheme=scheme)
        tab.ask("Say hello.")
        tab.finished()
        for name in ("System prompt", "Model and device", "Sampling", "Export and import"):
            tab.unfold(name)
        for part in ("Chat", "Compare", "Report"):
            tab.page.get_by_role("tab", name=part).click()
            tab.page.wait_for_timeout(300)
            found = axe.Axe().run(tab.page).response["violations"]
            bad = [
                f"{scheme} {part}: {each['id']} {each['impact']}: {node['html'][:160]}"
                for each in found
                if each["impact"] in ("serious", "critical")
                for node in each["nodes"]
            ]
            assert bad == []


def test_a_narrow_window_shows_everything(running: Chat, tabs: Callable[..., Tab]) -> None:
    tab = tabs(running.url)
    tab.page.set_viewport_size({"width": 360, "height": 740})
    tab.page.wait_for_timeout(300)
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= 360
    expect(tab.question).to_be_visible()


def test_two_choices_are_compared(running: Chat, tabs: Callable[..., Tab]) -> None:
    tab = tabs(running.url)
    tab.page.get_by_role("tab", name="Compare").click()
    tab.page.locator("#compare-question textarea").fill("What is the capital of France?")
    tab.page.locator("#compare-start").click()
    figures = tab.page.locator("#compare-figures")
    speeds = figures.locator("tr", has_text="tokens/s").locator("td")
    expect(speeds).to_have_text([re.compile(r"^\d+\.\d$")] * 2, timeout=60_000)
    expect(figures.locator("tr", has_text="device")).to_contain_text("CPU, prompt lookup")
    tab.ready("on CPU")


def test_a_report_is_measured_and_cancelled(running: Chat, tabs: Callable[..., Tab]) -> None:
    tab = tabs(running.url)
    tab.page.get_by_role("tab", name="Report").click()
    expect(tab.page.locator("#report-frame")).to_contain_text("No report yet.")
    tab.page.locator("#report-start").click()
    expect(tab.page.locator("#report-progress")).to_contain_text(re.compile(r"\d of \d runs measured"))
    tab.page.locator("#report-cancel").click()
    expect(tab.page.locator("#report-progress")).to_contain_text("Cancelled", timeout=30_000)
    tab.ready("on CPU")
