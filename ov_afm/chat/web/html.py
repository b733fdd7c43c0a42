"""The page's pieces of HTML and its style; every text of a model or a user that goes in is escaped here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..models import DeviceRow, Host
from ..session import View
from ..strings import TEXTS, context_line, figures_line
from .security import escape, plain

__all__ = ["CSS", "DOWNLOAD", "PICK", "bubbles", "gauge", "loading", "refused_devices", "status"]

CSS = """
.gradio-container > main { max-width: 76rem; margin: 0 auto; padding: 1rem !important; }
#title { flex: none; width: auto; min-width: 0 !important; }
#title h1 { white-space: nowrap; font-size: 1.25rem; font-weight: 650; margin: 0; letter-spacing: -0.01em; }
#head { align-items: center; gap: .75rem; }
#status { min-height: 0; min-width: 0 !important; flex: 1 1 10rem; width: auto; }
#restart { flex: none; }
.state { display: flex; gap: .5rem; align-items: center; font-size: .9rem; overflow-wrap: anywhere; }
.state::before { content: ""; flex: none; width: .6rem; height: .6rem; border-radius: 50%; background: #1a7f37; }
.state.loading::before, .state.busy::before { background: #bf8700; animation: pulse 1.2s ease-in-out infinite; }
.state.dead::before { background: #cf222e; }
@keyframes pulse { 50% { opacity: .35; } }
@media (prefers-reduced-motion: reduce) { .state::before { animation: none !important; } }
.gauge { font-size: .8rem; color: var(--body-text-color-subdued); }
.gauge .bar { height: 4px; border-radius: 2px; background: var(--border-color-primary); margin-bottom: .3rem; }
.gauge .bar div { height: 100%; border-radius: 2px; background: #0969da; min-width: 2px; }
.absent { font-size: .85rem; color: var(--body-text-color-subdued); margin: 0; padding: 0; cursor: not-allowed; }
.absent li { list-style: none; margin: .4rem 0; padding: .45rem .75rem; border-radius: 6px;
  border: 1px dashed var(--border-color-primary); background: var(--background-fill-secondary); }
.absent li::before { content: ""; display: inline-block; width: .7rem; height: .7rem; margin-right: .6rem;
  border: 1px solid currentColor; border-radius: 50%; vertical-align: -1px; opacity: .5; }
.note { font-size: .85rem; color: var(--body-text-color-subdued); }
#chat .message em:only-child { font-size: .8rem; font-style: normal; opacity: 1;
  color: var(--body-text-color); }
/* Gradio gives each part of an answer its own row of buttons; one, below the figures, is enough. */
#chat .bot.message { display: flex; flex-direction: column; align-items: flex-start; }
#chat .bot.message > * { max-width: 100%; }
#chat .bot.message > .message-buttons { order: 2; }
#chat .bot.message > .thought + .message-buttons { display: none; }
#send { max-width: 9rem; gap: .5rem; }
#send button { flex: 1; min-height: 2.2rem; padding: .3rem .8rem; font-size: 1rem; }
.gradio-container input[role="combobox"] { padding-right: 1.75rem; text-overflow: ellipsis; }
table.figures { width: 100%; border-collapse: collapse; font-size: .9rem; }
table.figures th, table.figures td { text-align: left; padding: .3rem .5rem;
  border-bottom: 1px solid var(--border-color-primary); }
table.figures td { font-variant-numeric: tabular-nums; }
iframe.report { width: 100%; height: 75vh; border: 1px solid var(--border-color-primary); border-radius: 6px; }
footer { display: none !important; }
@media (max-width: 480px) {
  .gradio-container > main { padding: .5rem !important; }
  #chat { min-height: 55vh; }
  #ask { flex-wrap: wrap; }
  #send { flex-direction: row; max-width: none; min-width: 100% !important; }
}
"""
# Exported text becomes a file in the browser: nothing is written here, and no file route is needed.
DOWNLOAD = """(text, name) => {
  if (!text) return;
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([text], {type: 'text/plain;charset=utf-8'}));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}"""
PICK = """() => new Promise(resolve => {
  const input = document.createElement('input');
  input.type = 'file';
  input.accept = '.json,application/json';
  input.id = 'import-file';
  input.hidden = true;
  document.body.appendChild(input);
  const finish = text => { input.remove(); resolve([text]); };
  input.addEventListener('cancel', () => finish(''));
  input.addEventListener('change', async () => finish(input.files.length ? await input.files[0].text() : ''));
  input.click();
})"""


def bubbles(view: View) -> list[dict[str, Any]]:
    """A conversation as Gradio's chat shows it: text of people and models made inert, figures below."""
    shown: list[dict[str, Any]] = []
    for turn in view.conversation.turns:
        content = [plain(turn.content)]
        if turn.figures and turn.role == "assistant":
            # A server's address is no link here.
            content.append(f"*{plain(figures_line(turn.figures)).replace('://', ':&#47;/')}*")
        shown.append({"role": turn.role, "content": content})
    if view.problem:
        shown.append({"role": "assistant", "content": [f"**{_one_line(view.problem)}**"]})
    elif view.working and (not shown or shown[-1]["role"] == "user"):
        waiting = TEXTS.thinking if view.place is None else TEXTS.waiting.format(place=view.place)
        shown.append({"role": "assistant", "content": [waiting]})
    return shown


def _one_line(text: str) -> str:
    return plain(" ".join(text.split())).replace("*", "\\*")


def gauge(view: View, context_length: int | None) -> str:
    """How full the context is after the last answer."""
    figures = next((turn.figures for turn in reversed(view.conversation.turns) if turn.figures), {})
    used = int(figures.get("prompt_tokens") or 0) + int(figures.get("new_tokens") or 0)
    total = context_length or figures.get("context_length")
    share = min(100.0, 100 * used / total) if total else 0.0
    line = escape(context_line(used, total))
    return f'<div class="gauge"><div class="bar"><div style="width:{share:.1f}%"></div></div>{line}</div>'


def loading(step: str, elapsed_s: float, last_s: float | None) -> str:
    """How far a model is loaded."""
    form = TEXTS.loading if last_s is None else TEXTS.loading_last
    return form.format(step=step, elapsed=elapsed_s, last=last_s)


def status(host: Host) -> str:
    """What the machine is doing."""
    kind, line = _state(host)
    return f'<div class="state {kind}" role="status">{escape(line)}</div>'


def _state(host: Host) -> tuple[str, str]:
    if host.reserved:
        return "busy", TEXTS.busy.format(purpose=host.reserved)
    if problem := host.problem():
        return "dead", TEXTS.dead.format(problem=problem)
    if progress := host.loading():
        return "loading", loading(*progress)
    info = host.info
    form = TEXTS.ready_remote if host.remote else TEXTS.ready
    return "ready", form.format(model=info.model, device=info.device, precision=info.precision)


def refused_devices(rows: Sequence[DeviceRow]) -> str:
    """The devices that cannot run a model, with the reasons."""
    items = "".join(f"<li>{escape(row.label)}: {escape(row.refused)}</li>" for row in rows if row.refused)
    return f'<ul class="absent" aria-label="{escape(TEXTS.refused_devices)}">{items}</ul>' if items else ""
