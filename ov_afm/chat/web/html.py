"""The page's pieces of HTML and its style. Jinja escapes every value that goes in."""

from __future__ import annotations

from collections.abc import Sequence

from jinja2 import Environment, StrictUndefined

from ..conversation import context_line
from ..models import DeviceRow, ModelManager
from ..session import View

__all__ = [
    "CSS",
    "DOWNLOAD",
    "PICK",
    "figures_table",
    "gauge",
    "loading",
    "note",
    "progress",
    "refused_devices",
    "report_frame",
    "status",
]

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


ENVIRONMENT = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
STATE = ENVIRONMENT.from_string('<div class="state {{ kind }}" role="status">{{ line }}</div>')
NOTE = ENVIRONMENT.from_string('<p class="note"{% if role %} role="{{ role }}"{% endif %}>{{ text }}</p>')
BAR = ENVIRONMENT.from_string(
    '<div class="gauge"{% if role %} role="{{ role }}"{% endif %}>'
    '<div class="bar"><div style="width:{{ "%.1f" % share }}%"></div></div>{{ line }}</div>'
)
REFUSED = ENVIRONMENT.from_string("""
<ul class="absent" aria-label="{{ label }}">
{% for row in rows %}
<li>{{ row.label }}: {{ row.refused }}</li>
{% endfor %}
</ul>
""")
FIGURES = ENVIRONMENT.from_string("""
<table class="figures"><thead><tr><td></td>
{% for name in names %}
<th scope="col">{{ name }}</th>
{% endfor %}
</tr></thead><tbody>
{% for label, cells in rows %}
<tr><th scope="row">{{ label }}</th>{% for cell in cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table>
""")
# The report is a page of its own, without scripts; the sandbox makes sure of it.
FRAME = ENVIRONMENT.from_string('<iframe class="report" sandbox title="{{ title }}" srcdoc="{{ page }}"></iframe>')


def gauge(view: View, context_length: int | None) -> str:
    """How full the context is after the last answer."""
    figures = next((turn.figures for turn in reversed(view.conversation.turns) if turn.figures), {})
    used = int(figures.get("prompt_tokens") or 0) + int(figures.get("new_tokens") or 0)
    total = context_length or figures.get("context_length")
    share = min(100.0, 100 * used / total) if total else 0.0
    return BAR.render(role="", share=share, line=context_line(used, total))


def progress(done: int, total: int, line: str) -> str:
    """How much of a long piece of work is done."""
    return BAR.render(role="status", share=100 * done / total if total else 100, line=line)


def note(text: str, role: str = "") -> str:
    """A line of small text, read out by screen readers if it has the role `status` or `alert`."""
    return NOTE.render(role=role, text=text)


def loading(step: str, elapsed_s: float, last_s: float | None) -> str:
    """How far a model is loaded, as text."""
    return f"{step}, {elapsed_s:.0f} s" + ("" if last_s is None else f" of about {last_s:.0f} s")


def status(models: ModelManager) -> str:
    """What the machine is doing."""
    if models.reserved:
        kind, line = "busy", f"The machine is busy with {models.reserved}"
    elif models.problem:
        kind, line = "dead", f"The engine is down: {models.problem}"
    elif step := models.loading:
        kind, line = "loading", loading(*step)
    elif models.remote:
        kind, line = "ready", f"{models.info.model} at {models.info.device}"
    else:
        kind, line = "ready", f"{models.info.model} on {models.info.device}, {models.info.precision}"
    return STATE.render(kind=kind, line=line)


def refused_devices(rows: Sequence[DeviceRow]) -> str:
    """The devices that cannot run a model, with the reasons."""
    refused = [row for row in rows if row.refused]
    return REFUSED.render(label="Devices that cannot run this model", rows=refused) if refused else ""


def figures_table(names: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """A table with a column for each name; rows have a label and a cell for each."""
    return FIGURES.render(names=names, rows=rows)


def report_frame(page: str) -> str:
    """A report inside the page."""
    return FRAME.render(title="Last report", page=page)
