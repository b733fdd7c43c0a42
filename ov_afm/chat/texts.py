"""Every text that the chat shows to people, so that it can be read, checked and translated in one place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["TEXTS", "Texts", "context_line", "figures_line"]


@dataclass(frozen=True, slots=True)
class Texts:
    """Texts of the terminal chat and of the browser chat."""

    untitled: str = "New conversation"
    you: str = "You"
    model: str = "Model"
    stopped: str = "stopped"
    dropped: str = "{count} oldest messages left out: the context is full"
    terminal_help: str = (
        "/help            these lines\n"
        "/system [TEXT]   show the system prompt, or set it; /system - takes it away\n"
        "/device [NAME]   show devices, or load the model on another; the conversation stays\n"
        "/save FILE       write the conversation: .md for people, anything else as JSON\n"
        "/load FILE       go on with a saved conversation (JSON)\n"
        "/regen           answer the last question again\n"
        "/new             forget the conversation\n"
        "/stats           figures of the last answer, and how full the context is\n"
        "/exit            leave; so does Ctrl-D\n\n"
        "Enter sends, Alt-Enter begins a new line. Ctrl-C stops an answer and keeps the chat."
    )
    terminal_hello: str = "{model} on {device}. /help shows the commands."
    terminal_leave: str = "Ctrl-D or /exit leaves"

    title: str = "ov_afm chat"
    tab_chat: str = "Chat"
    tab_compare: str = "Compare"
    tab_report: str = "Report"
    empty: str = "Ask something. Nothing leaves this machine."
    empty_remote: str = "Ask something. Questions go to {url}."
    question: str = "Your question"
    question_hint: str = "Enter sends, Shift-Enter begins a new line"
    send: str = "Send"
    stop: str = "Stop"
    conversations: str = "Conversations"
    new: str = "New"
    delete: str = "Delete"
    rename: str = "Name of this conversation"
    system: str = "System prompt"
    system_hint: str = "Said to the model before everything else"
    setup: str = "Model and device"
    model_dir: str = "Model"
    device: str = "Device"
    load: str = "Load"
    sampling: str = "Sampling"
    temperature: str = "Temperature"
    top_k: str = "Top k"
    top_p: str = "Top p"
    repetition_penalty: str = "Repetition penalty"
    max_new_tokens: str = "Longest answer, tokens"
    reset: str = "Reset to the model's values"
    files: str = "Export and import"
    export_markdown: str = "Export as Markdown"
    export_json: str = "Export as JSON"
    import_json: str = "Import JSON"
    restart: str = "Start the engine again"
    ready: str = "{model} on {device}, {precision}"
    ready_remote: str = "{model} at {device}"
    loading: str = "{step}, {elapsed:.0f} s"
    loading_last: str = "{step}, {elapsed:.0f} s of about {last:.0f} s"
    dead: str = "The engine is down: {problem}"
    busy: str = "The machine is busy with {purpose}"
    waiting: str = "{place} before you"
    not_here: str = "Not for this model: "
    compare_intro: str = (
        "The same question to two choices, one after the other. Each is loaded alone in a fresh process, warmed up and "
        "asked once with these sampling values, so that neither profits from the other. The chat waits meanwhile."
    )
    choice: str = "Choice {name}"
    lookup: str = "Prompt lookup"
    compare: str = "Compare"
    comparison: str = "a comparison"
    cancel: str = "Cancel"
    report_intro: str = (
        "Measures the model on every device that can run it. It takes minutes; the chat's engine is unloaded meanwhile."
    )
    report_none: str = "No report yet."
    report_frame: str = "Last report"
    report_start: str = "Measure now"
    report_done: str = "measured"
    report_cancelled: str = "Cancelled; the next measurement goes on from here."
    measurement: str = "a measurement"
    local_only: str = "Needs a model on this machine; this chat talks to a server."


TEXTS = Texts()


def figures_line(figures: Mapping[str, Any]) -> str:
    """One line on what an answer cost; figures that are not there are left out."""
    parts = []
    if figures.get("ttft_ms") is not None:
        parts.append(f"first token {figures['ttft_ms'] / 1000:.2f} s")
    if figures.get("tokens_per_s"):
        parts.append(f"{figures['tokens_per_s']:.1f} tokens/s")
    if figures.get("new_tokens") is not None:
        parts.append(f"{figures['new_tokens']} tokens")
    where = [str(figures[name]) for name in ("device", "precision") if figures.get(name)]
    parts += where
    if figures.get("finish_reason") == "cancelled":
        parts.append(TEXTS.stopped)
    elif figures.get("finish_reason") == "length":
        parts.append("cut off at the longest answer")
    if figures.get("dropped"):
        parts.append(TEXTS.dropped.format(count=figures["dropped"]))
    return " · ".join(parts)


def context_line(used: int, total: int | None) -> str:
    """How full the context is."""
    if not total:
        return f"context: {used:,} tokens used"
    return f"context: {used:,} of {total:,} tokens ({used / total:.0%}); when it is full the oldest turns are left out"
