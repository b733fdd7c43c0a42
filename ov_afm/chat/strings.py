"""Every text that the chat shows, in one place where it can be checked and translated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["STRINGS", "Strings", "context_line", "figures_line"]


@dataclass(frozen=True, slots=True)
class Strings:
    """Texts of the terminal chat and of the browser chat."""

    untitled: str = "New conversation"
    you: str = "You"
    model: str = "Model"
    stopped: str = "stopped"
    dropped: str = "{count} oldest messages left out: the context is full"
    terminal_help: str = (
        "/help            show these commands\n"
        "/system [TEXT]   show the system prompt, or set it; /system - removes it\n"
        "/device [NAME]   show devices, or load the model on another; the conversation stays\n"
        "/save FILE       write the conversation: .md for people, anything else as JSON\n"
        "/load FILE       continue a saved conversation (JSON)\n"
        "/regen           answer the last question again\n"
        "/new             begin a new conversation\n"
        "/stats           figures of the last answer, and how full the context is\n"
        "/exit            leave; so does Ctrl-D\n\n"
        "Enter sends, Alt-Enter begins a new line. Ctrl-C stops an answer and keeps the chat."
    )
    terminal_hello: str = "{model} on {device}. /help shows the commands."
    terminal_leave: str = "Ctrl-D or /exit leaves"
    terminal_system: str = "system prompt: {text}"
    terminal_no_system: str = "none"
    terminal_running: str = "running on {device}"
    terminal_saved: str = "saved {count} messages to {path}"
    terminal_loaded: str = "loaded {count} messages from {path}"
    terminal_new: str = "a new conversation"
    terminal_no_figures: str = "no answer yet"
    terminal_empty: str = "(empty)"

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
    system_hint: str = "What the model reads before the conversation"
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
    waiting: str = "{ahead} ahead of you"
    thinking: str = "…"
    emulated: str = "NPU-EMULATED – the NPU's software path on the CPU, to try its limits"
    refused: str = "cannot run {found}, needs {needs}"
    no_answer: str = "the driver did not answer: {fault}"
    not_here: str = "not in this machine"
    refused_devices: str = "Devices that cannot run this model"
    conversation_number: str = "Conversation number"
    exported_text: str = "Exported text"
    exported_file: str = "Exported file"
    compare_intro: str = (
        "Asks two choices the same question, one after the other. Each is loaded alone in a new process, warmed up and "
        "asked once with these sampling values, so that neither profits from the other. The chat waits meanwhile."
    )
    choice: str = "Choice {name}"
    lookup: str = "Prompt lookup"
    compare: str = "Compare"
    comparison: str = "a comparison"
    compare_on: str = "{model} on {device}"
    compare_lookup: str = ", prompt lookup"
    compare_rows: tuple[str, ...] = (
        "model", "device", "first token", "tokens/s", "tokens", "whole answer", "loading"
    )  # fmt: skip
    no_figure: str = "–"
    cancel: str = "Cancel"
    report_intro: str = (
        "Measures the model on every device that can run it. It takes minutes; the chat's engine is unloaded meanwhile."
    )
    report_none: str = "No report yet."
    report_frame: str = "Last report"
    report_start: str = "Measure now"
    report_runs: str = "Runs of each"
    report_progress: str = "{done} of {total} runs measured, {elapsed:.0f} s"
    report_cancelled: str = "Cancelled; the next measurement continues from here."
    measurement: str = "a measurement"
    address: str = "chat on {url} (Ctrl-C ends it)"
    shared: str = "shared at {url}"
    first_token: str = "first token {seconds:.2f} s"
    speed: str = "{tokens_per_s:.1f} tokens/s"
    tokens: str = "{count} tokens"
    cut_off: str = "cut off at the longest answer"
    context: str = "context: {used:,} tokens used"
    context_of: str = (
        "context: {used:,} of {total:,} tokens ({share:.0%}); when it is full the oldest turns are left out"
    )


STRINGS = Strings()


def figures_line(figures: Mapping[str, Any]) -> str:
    """One line on what an answer cost; missing figures are left out."""
    parts = []
    if figures.get("ttft_ms") is not None:
        parts.append(STRINGS.first_token.format(seconds=figures["ttft_ms"] / 1000))
    if figures.get("tokens_per_s"):
        parts.append(STRINGS.speed.format(tokens_per_s=figures["tokens_per_s"]))
    if figures.get("new_tokens") is not None:
        parts.append(STRINGS.tokens.format(count=figures["new_tokens"]))
    parts += [str(figures[name]) for name in ("device", "precision") if figures.get(name)]
    if figures.get("finish_reason") == "cancelled":
        parts.append(STRINGS.stopped)
    elif figures.get("finish_reason") == "length":
        parts.append(STRINGS.cut_off)
    if figures.get("dropped"):
        parts.append(STRINGS.dropped.format(count=figures["dropped"]))
    return " · ".join(parts)


def context_line(used: int, total: int | None) -> str:
    """How full the context is."""
    if not total:
        return STRINGS.context.format(used=used)
    return STRINGS.context_of.format(used=used, total=total, share=used / total)
