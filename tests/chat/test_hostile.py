"""Hundreds of hostile messages in a real browser, each clicked: nothing runs, nothing is fetched, nothing poses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.chatting import CHROMIUM, Tab, chat, server_that_says
from support.hostile import corpus

playwright = pytest.importorskip("playwright.sync_api")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; make tools installs it, or says how"),
]
# Clicks everything in the messages but the page's own buttons, and counts what was clicked.
CLICK_ALL = """() => {
  let clicked = 0;
  for (const each of document.querySelectorAll('#chat .content, #chat .content *')) {
    for (const kind of ['mouseover', 'focus', 'click', 'auxclick'])
      each.dispatchEvent(new MouseEvent(kind, {bubbles: true, cancelable: true}));
    clicked += 1;
  }
  return clicked;
}"""
ALLOWED = """() => [...new Set([...document.querySelectorAll('#chat .content *')].map(each => each.localName))]"""


def test_hostile_messages_are_inert_when_clicked(tmp_path: Path) -> None:
    evil = corpus()
    turns = [{"role": role, "content": text} for text in evil for role in ("user", "assistant")]
    file = tmp_path / "hostile.json"
    file.write_text(json.dumps({"ov_afm_chat": 1, "title": "hostile", "messages": turns}))
    with (
        server_that_says("Hello.") as url,
        chat("--url", url, data=tmp_path / "data") as running,
        playwright.sync_playwright() as engine,
    ):
        browser = engine.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        window = browser.new_context()
        tab = Tab(window, running.url)
        title = tab.page.title()
        asked: list[str] = []
        opened: list[Any] = []
        questions: list[str] = []

        def refuse(dialog: Any) -> None:
            questions.append(dialog.message)
            dialog.dismiss()

        tab.page.on("dialog", refuse)
        tab.unfold("Export and import")
        window.on("page", lambda each: opened.append(each))
        window.on("request", lambda each: asked.append(each.url))
        with tab.page.expect_file_chooser() as chooser:
            tab.press("Import JSON")
        chooser.value.set_files(file)
        playwright.expect(tab.questions).to_have_count(len(evil), timeout=120_000)
        assert tab.page.evaluate(CLICK_ALL) > 3 * len(evil)
        tab.page.wait_for_timeout(1_000)
        assert tab.page.evaluate("window.hurt") is None
        assert tab.page.title() == title
        assert tab.page.url.rstrip("/") == running.url
        assert opened == []
        assert [each for each in asked if not each.startswith((running.url, "blob:", "data:"))] == []
        # The page itself asks before a link opens, and shows all of its address.
        assert questions
        assert all(each.startswith("Open this address from the conversation?\n\n") for each in questions)
        elements = set(tab.page.evaluate(ALLOWED))
        assert not elements & {"button", "input", "form", "iframe", "img", "svg", "style", "script", "video", "object"}
        assert tab.page.locator("#send-button").count() == 1
        assert tab.page.locator("#chat .content[style], #chat .content [id]").count() == 0
        # Copied as it is.
        window.grant_permissions(["clipboard-read", "clipboard-write"])
        for place in (0, len(evil) // 2, len(evil) - 8):
            tab.page.locator("#chat .bot.message").nth(place).get_by_label("Copy message").click()
            copied = tab.page.evaluate("navigator.clipboard.readText()")
            assert copied == evil[place]
        assert tab.errors == []
        browser.close()
