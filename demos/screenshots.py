"""Pictures of the chat for the README: `python demos/screenshots.py MODEL_DIR`.

Starts the chat with an empty store, asks two questions in Chromium and writes docs/img/chat-light.png,
chat-dark.png and chat-narrow.png. Needs the packages of the `dev` extra and Chromium.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from playwright.sync_api import expect, sync_playwright

OUT = Path(__file__).parent.parent / "docs" / "img"
QUESTIONS = ("What is the capital of France?", "Write a Python function that adds two numbers.")
SHAPES: dict[str, dict[str, Any]] = {
    "light": {"viewport": {"width": 1200, "height": 800}, "color_scheme": "light"},
    "dark": {"viewport": {"width": 1200, "height": 800}, "color_scheme": "dark"},
    "narrow": {"viewport": {"width": 360, "height": 740}, "color_scheme": "light", "device_scale_factor": 2},
}


def main(model_dir: str) -> None:
    """Take the pictures."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        sys.exit("no Chromium here; make tools installs it, or says how")
    OUT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as data:
        options = ["--no-browser", "--port", "0", "--greedy", "--max-new-tokens", "160"]
        command = [sys.executable, "-m", "ov_afm", "chat", "--ui", model_dir, *options]
        environment = {**os.environ, "OV_AFM_DATA": data}
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as running:
            try:
                assert running.stderr
                url = next(found[1] for line in running.stderr if (found := re.search(r"chat on (\S+)", line)))
                take(url, chromium)
            finally:
                running.terminate()


def take(url: str, chromium: str) -> None:
    """Hold the conversation, then look at it in each shape."""
    with sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, shape in SHAPES.items():
            page = browser.new_page(**shape)
            page.goto(url)
            page.locator("#status .state.ready").wait_for(timeout=120_000)
            for number, question in enumerate(QUESTIONS, 1):
                page.get_by_label("Your question").first.fill(question)
                page.get_by_label("Your question").first.press("Enter")
                expect(page.get_by_text(re.compile(r"tokens/s · \d+ tokens"))).to_have_count(number, timeout=120_000)
            if name != "narrow":
                page.get_by_role("button", name="Model and device").click()
                page.get_by_label("NPU-EMULATED").wait_for()
            page.wait_for_timeout(800)
            page.screenshot(path=OUT / f"chat-{name}.png")
            page.close()
        browser.close()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python demos/screenshots.py MODEL_DIR")
    main(sys.argv[1])
