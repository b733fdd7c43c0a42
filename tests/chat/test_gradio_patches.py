"""What is changed inside Gradio is there to be changed, and an upgrade that takes it away is noticed."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest

from ov_afm.chat.web.gradio_patches import no_stubs, poll_less

gradio = pytest.importorskip("gradio")


def test_no_stub_is_written_inside_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    component_meta = importlib.import_module("gradio.component_meta")
    getfile = inspect.getfile
    monkeypatch.setattr(inspect, "getfile", lambda subject: (asked.append(subject), getfile(subject))[1])
    events = gradio.Textbox.EVENTS
    component_meta.create_or_modify_pyi(gradio.Textbox, "Textbox", events)
    assert gradio.Textbox in asked
    asked.clear()
    with no_stubs():
        component_meta.create_or_modify_pyi(gradio.Textbox, "Textbox", events)
        assert inspect.getfile(gradio.Blocks.__init__).endswith("blocks.py")
    assert gradio.Textbox not in asked


def test_the_queue_polls_less() -> None:
    with gradio.Blocks() as blocks:
        pass
    before = blocks._queue.sleep_when_free
    poll_less(blocks)
    assert blocks._queue.sleep_when_free > before
