"""The chat in a real browser: Chromium, a real page, a real model."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.chatting import CHROMIUM, LONG, Chat, Open, Tab, chat, server_that_says

playwright = pytest.importorskip("playwright.sync_api")
axe = pytest.importorskip("axe_playwright_python.sync_playwright")
expect = playwright.expect
# Gradio's round trips on a machine whose cores are all in use.
expect.set_options(timeout=30_000)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; make tools installs it, or says how"),
]


@pytest.fixture(scope="module")
def models(tiny_model: Path, smollm2_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model that speaks and one that is quick."""
    folder = tmp_path_factory.mktemp("offer")
    for source in (smollm2_model, tiny_model):
        shutil.copytree(source, folder / source.name)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the conversations are."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def running(models: Path, data: Path) -> Iterator[Chat]:
    with chat(models / "smollm2-int8", models, "--greedy", "--max-new-tokens", "48", data=data) as found:
        yield found


@pytest.fixture
def changing(models: Path, tmp_path: Path) -> Iterator[Chat]:
    """A chat of a test's own, which may leave another model or no engine behind."""
    with chat(models / "smollm2-int8", models, "--greedy", "--max-new-tokens", "48", data=tmp_path) as found:
        yield found


@pytest.fixture(scope="module")
def window() -> Iterator[Any]:
    with playwright.sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser.new_context()
        browser.close()


@pytest.fixture
def tabs(window: Any) -> Iterator[Open]:
    """Opens tabs; in none of them may the console show an error."""
    opened: list[Tab] = []

    def open_(url: str) -> Tab:
        opened.append(Tab(window, url))
        return opened[-1]

    yield open_
    errors = [error for tab in opened for error in tab.errors]
    for tab in opened:
        tab.page.close()
    assert errors == []


def test_a_question_is_answered_and_found_again_after_reload(running: Chat, tabs: Open) -> None:
    tab = tabs(running.url)
    tab.ask("What is the capital of France?")
    answer = tab.finished()
    assert "Paris" in answer
    assert re.search(r"first token \d+\.\d\d s · [\d.]+ tokens/s · \d+ tokens · CPU · int8", answer)
    expect(tab.page.locator("#gauge")).to_contain_text("of 8,192 tokens")
    expect(tab.page.get_by_label("Copy message").locator("visible=true")).to_have_count(2)
    tab.reload()
    expect(tab.answers.last).to_contain_text("Paris")


def test_an_answer_goes_on_after_a_reload_and_in_a_second_tab(running: Chat, tabs: Open) -> None:
    tab = tabs(running.url)
    tab.begin_a_long_answer()
    tab.reload()
    expect(tab.questions).to_have_count(1)
    before = len(tab.answers.last.inner_text())
    expect(tab.answers.last).to_contain_text(re.compile(f".{{{before + 40},}}", re.DOTALL))
    second = tabs(running.url)
    second.choose("Conversations", LONG)
    before = len(second.answers.last.inner_text())
    expect(second.answers.last).to_contain_text(re.compile(f".{{{before + 40},}}", re.DOTALL))
    second.press("Stop")
    assert "stopped" in second.finished()
    assert "stopped" in tab.finished()


def test_stop_regenerate_edit_and_undo(running: Chat, tabs: Open) -> None:
    tab = tabs(running.url)
    tab.ask("Say hello.")
    # Its figures differ.
    before = tab.finished()
    tab.act("Retry")
    expect(tab.answers.last).not_to_have_text(before, use_inner_text=True)
    tab.finished()
    assert tab.answers.count() == 1
    tab.page.get_by_label("Edit").first.click()
    tab.page.locator("#chat textarea").fill("What is the capital of France?")
    tab.page.get_by_label("Submit").first.click()
    expect(tab.answers.last).to_contain_text("Paris", timeout=60_000)
    tab.finished()
    expect(tab.questions).to_have_count(1)
    tab.act("Undo")
    expect(tab.questions).to_have_count(0)
    expect(tab.question).to_have_value("What is the capital of France?")


def test_stop_ends_the_answer_soon(running: Chat, tabs: Open) -> None:
    tab = tabs(running.url)
    tab.begin_a_long_answer()
    tab.press("Stop")
    # The answer itself would go on for longer.
    expect(tab.answers.last).to_contain_text("stopped", timeout=20_000)
    tab.ask("What is the capital of France?")
    expect(tab.answers).to_have_count(2, timeout=20_000)
    tab.press("Stop")
    tab.finished()


def test_the_keyboard_is_enough(running: Chat, tabs: Open) -> None:
    tab = tabs(running.url)
    keys, focused = tab.page.keyboard, tab.page.locator("*:focus")
    tab.question.focus()
    keys.type("Say hello")
    keys.press("Shift+Enter")
    keys.type("and goodbye.")
    keys.press("Enter")
    tab.finished()
    expect(tab.questions).to_have_text(re.compile(r"Say hello\s+and goodbye\."), use_inner_text=True)
    for name in ("Send", "Stop"):
        keys.press("Tab")
        expect(focused).to_have_text(name)
    # The list of conversations calls the server when it is left; that answer may come after the one to "New".
    late: list[Any] = []
    tab.page.route("**/queue/join**", lambda route: route.continue_() if late else late.append(route))
    for _ in range(2):
        keys.press("Tab")
    expect(focused).to_have_text("New")
    keys.press("Enter")
    expect(tab.questions).to_have_count(0)
    with tab.page.expect_response("**/queue/join**"):
        late[0].continue_()
    tab.page.unroute("**/queue/join**")
    tab.page.wait_for_timeout(1_000)
    expect(tab.questions).to_have_count(0)
    for name in ("Delete", "System prompt"):
        keys.press("Tab")
        expect(focused).to_contain_text(name)
    keys.press("Enter")
    expect(tab.page.get_by_role("textbox", name="System prompt")).to_be_visible()


def test_another_conversation_is_shown_while_one_is_answered(running: Chat, tabs: Open) -> None:
    tab = tabs(running.url)
    tab.begin_a_long_answer()
    tab.press("New")
    expect(tab.questions).to_have_count(0)
    tab.page.wait_for_timeout(1_000)
    expect(tab.questions).to_have_count(0)
    tab.choose("Conversations", LONG)
    expect(tab.answers.last).to_contain_text("stopped")
    tab.act("Retry")
    expect(tab.answers.last).not_to_contain_text("stopped")
    expect(tab.answers.last).to_contain_text(re.compile(r"\w+ \w+ \w+ \w+"), timeout=60_000)
    tab.act("Clear")
    expect(tab.answers).to_have_count(0)


def test_two_tabs_never_mix_and_tell_the_place_in_the_line(running: Chat, tabs: Open) -> None:
    first, second, third = (tabs(running.url) for _ in range(3))
    first.begin_a_long_answer()
    second.ask("What is the capital of France?")
    expect(second.answers.last).to_contain_text("1 ahead of you")
    third.ask("What is the capital of Italy?")
    expect(third.answers.last).to_contain_text("2 ahead of you")
    first.press("Stop")
    assert "stopped" in first.finished()
    assert "Paris" in second.finished()
    assert re.search("Rome|Italy", third.finished())
    assert [each.questions.all_inner_texts()[0].split()[-1] for each in (first, second, third)] == [
        "sea.", "France?", "Italy?"
    ]  # fmt: skip
    assert [each.answers.count() for each in (first, second, third)] == [1, 1, 1]


def test_a_closed_tab_frees_its_generation_and_its_place(running: Chat, tabs: Open) -> None:
    leaving, waiting, staying = (tabs(running.url) for _ in range(3))
    leaving.begin_a_long_answer()
    waiting.ask(LONG)
    expect(waiting.answers.last).to_contain_text("1 ahead of you")
    staying.ask("What is the capital of France?")
    expect(staying.answers.last).to_contain_text("2 ahead of you")
    waiting.page.close()
    expect(staying.answers.last).to_contain_text("1 ahead of you")
    leaving.page.close()
    # Without the place it would be the time of 4,096 tokens.
    expect(staying.answers.last).to_contain_text("Paris", timeout=30_000)


def test_model_and_device_are_changed_and_the_conversation_stays(changing: Chat, tabs: Open) -> None:
    tab = tabs(changing.url)
    tab.ask("What is the capital of France?")
    tab.finished()
    tab.unfold("Model and device")
    expect(tab.page.locator("#device ~ * .absent, .absent").first).to_contain_text("NPU: not in this machine")
    tab.choose("Model", "tiny-int8 · int8")
    tab.page.get_by_label("NPU-EMULATED").check()
    tab.press("Load")
    expect(tab.page.locator("#status .state.loading")).to_contain_text(re.compile(r", \d+ s"))
    tab.ready("tiny-int8 on emulated NPU")
    assert "Paris" in tab.answers.last.inner_text()
    tab.ask("And of Italy?")
    expect(tab.answers).to_have_count(2, timeout=20_000)
    assert "emulated NPU" in tab.finished()
    # What the server says about the model's devices may come after the user has chosen one.
    held: list[Any] = []
    tab.page.route("**/queue/join**", lambda route: held.append(route))
    tab.choose("Model", "smollm2-int8 · int8")
    tab.page.get_by_label("CPU –").check()
    while not held:
        tab.page.wait_for_timeout(20)
    with tab.page.expect_response("**/queue/join**"):
        held[0].continue_()
    tab.page.unroute("**/queue/join**")
    tab.page.wait_for_timeout(500)
    tab.press("Load")
    tab.ready("smollm2-int8 on CPU")
    assert "emulated NPU" in tab.answers.last.inner_text()


def test_stop_while_the_model_loads(changing: Chat, tabs: Open) -> None:
    tab = tabs(changing.url)
    tab.unfold("Model and device")
    tab.press("Load")
    expect(tab.page.locator("#status .state.loading")).to_be_visible()
    engine = changing.engine()
    engine.suspend()
    tab.ask("What is the capital of France?")
    expect(tab.questions).to_have_count(1)
    tab.press("Stop")
    expect(tab.answers.last).to_contain_text("stopped")
    engine.resume()
    tab.ready()
    tab.act("Retry")
    expect(tab.answers.last).to_contain_text("Paris", timeout=60_000)


def test_a_dead_engine_comes_back_and_the_question_is_asked_again(changing: Chat, tabs: Open) -> None:
    tab = tabs(changing.url)
    tab.begin_a_long_answer()
    first = changing.engine()
    first.kill()
    expect(tab.page.locator("#status .state.loading")).to_be_visible()
    tab.ready()
    assert changing.engine().pid != first.pid
    expect(tab.answers.last).to_contain_text(re.compile(r"\w+ \w+ \w+ \w+"), timeout=60_000)
    tab.press("Stop")
    assert "stopped" in tab.finished()
    # Between two questions too.
    changing.engine().kill()
    expect(tab.page.locator("#status .state.dead")).to_contain_text(
        "The engine is down: the engine was ended by SIGKILL"
    )
    tab.ask("What is the capital of France?")
    expect(tab.answers.last).to_contain_text("Paris", timeout=60_000)
    tab.finished()
    # One retry, no more.
    tab.ask(LONG)
    for _ in range(2):
        tab.ready()
        expect(tab.answers.last).to_contain_text(re.compile(r"\w+ \w+ \w+ \w+"), timeout=60_000)
        changing.engine().kill()
        tab.page.wait_for_timeout(1_500)
    expect(tab.answers.last).to_contain_text("the engine was ended by SIGKILL; its messages are in ", timeout=10_000)
    tab.press("Start the engine again")
    tab.ready()
    tab.act("Retry")
    expect(tab.answers.last).to_contain_text(re.compile(r"\w+ \w+ \w+ \w+"), timeout=60_000)


def test_conversations_that_cannot_be_kept_are_told(running: Chat, tabs: Open, data: Path) -> None:
    tab = tabs(running.url)
    with contextlib.closing(sqlite3.connect(data / "chat.sqlite")) as base:
        base.execute("ALTER TABLE conversation RENAME TO away")
        try:
            tab.ask("What is the capital of France?")
            told = tab.page.get_by_text("chat.sqlite cannot be used: no such table: conversation").first
            expect(told).to_be_visible()
        finally:
            base.execute("ALTER TABLE away RENAME TO conversation")
    expect(tab.question).to_have_value("What is the capital of France?")
    tab.press("Send")
    assert "Paris" in tab.finished()


def test_conversations_are_named_listed_exported_imported_and_deleted(
    running: Chat, tabs: Open, tmp_path: Path
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
    expect(tab.questions).to_contain_text("Say hello.")
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


def test_a_models_text_is_inert(running: Chat, tabs: Open, data: Path) -> None:
    with server_that_says(EVIL) as url, chat("--url", url, data=data) as remote:
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
        tab.page.close()
    # Two chats may share the file of the conversations.
    beside = tabs(running.url)
    beside.choose("Conversations", "<img src=x onerror")
    expect(beside.answers.last).to_contain_text("bold?")
    assert beside.page.evaluate("window.hurt") is None


def test_no_serious_accessibility_violation(running: Chat, tabs: Open) -> None:
    tab = tabs(running.url)
    tab.ask("Say hello.")
    tab.finished()
    for scheme in ("light", "dark"):
        tab.page.emulate_media(color_scheme=scheme)
        tab.reload()
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


def test_a_narrow_window_shows_everything(running: Chat, tabs: Open) -> None:
    tab = tabs(running.url)
    tab.page.set_viewport_size({"width": 360, "height": 740})
    expect(tab.question).to_be_visible()
    for name in ("System prompt", "Model and device", "Sampling", "Export and import"):
        tab.unfold(name)
    for part in ("Compare", "Report", "Chat"):
        tab.page.get_by_role("tab", name=part).click()
        tab.page.wait_for_timeout(300)
        assert tab.page.evaluate("document.documentElement.scrollWidth") <= 360


def test_two_choices_are_compared(running: Chat, tabs: Open) -> None:
    tab = tabs(running.url)
    tab.page.get_by_role("tab", name="Compare").click()
    for name in ("A", "B"):
        tab.choose(f"Choice {name}: Model", "tiny-int8 · int8")
    tab.choose("Choice A: Device", "NPU-EMULATED")
    tab.page.locator("#compare-question textarea").fill("What is the capital of France?")
    tab.page.locator("#compare-start").click()
    expect(tab.status).to_contain_text("The machine is busy with a comparison")
    figures = tab.page.locator("#compare-figures")
    speeds = figures.locator("tr", has_text="tokens/s").locator("td")
    expect(speeds).to_have_text([re.compile(r"^\d+\.\d$")] * 2, timeout=60_000)
    devices = figures.locator("tr", has_text="device").locator("td")
    expect(devices).to_have_text(["emulated NPU", "CPU, prompt lookup"])
    expect(tab.page.locator("#compare-B")).to_contain_text("tokens/s")
    tab.ready("on CPU")


def test_a_comparison_is_cancelled_while_it_loads(running: Chat, tabs: Open) -> None:
    tab = tabs(running.url)
    tab.page.get_by_role("tab", name="Compare").click()
    tab.page.locator("#compare-question textarea").fill("What is the capital of France?")
    tab.page.locator("#compare-start").click()
    expect(tab.page.locator("#compare-figures")).to_contain_text(re.compile(r"smollm2-int8: .+, \d+ s"))
    tab.page.locator("#compare-cancel").click()
    expect(tab.page.locator("#compare-figures")).to_have_text("")
    tab.ready("on CPU")


def test_a_report_is_measured_cancelled_and_shown(running: Chat, tabs: Open) -> None:
    tab = tabs(running.url)
    tab.page.get_by_role("tab", name="Report").click()
    expect(tab.page.locator("#report-frame")).to_contain_text("No report yet.")
    tab.choose("Model", "tiny-int8 · int8")
    tab.page.get_by_label("number input for Runs of each").fill("1")
    progress, start = tab.page.locator("#report-progress"), tab.page.locator("#report-start")
    start.click()
    expect(progress).to_contain_text(re.compile(r"\d of 1 runs measured"))
    tab.page.locator("#report-cancel").click()
    expect(progress).to_contain_text("Cancelled", timeout=30_000)
    start.click()
    expect(progress).to_contain_text("1 of 1 runs measured", timeout=120_000)
    shown = tab.page.frame_locator("iframe.report").locator("body")
    expect(shown).to_contain_text("tiny-int8", timeout=120_000)
    tab.ready("on CPU")
