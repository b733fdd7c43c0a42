"""The conversation on the page: messages, and what can be done with each.

The messages' HTML is made here (`rendering`); the browser only puts it in place. Beside it travels the text itself,
which is what is copied and edited. A link opens only after the page has asked, because a model chooses its text and
its address.
"""

from __future__ import annotations

import json
from typing import Any

from ..conversation import figures_line
from ..session import View
from .rendering import as_html, as_text, highlight_css

__all__ = ["CSS", "component", "messages"]

ACTIONS = {"copy": "Copy message", "edit": "Edit", "retry": "Retry", "undo": "Undo", "clear": "Clear"}

CSS = """
#chat { height: 62vh; overflow-y: auto !important; border: 1px solid var(--border-color-primary); border-radius: 8px;
  padding: 1rem; background: var(--background-fill-primary); }
#chat .turns { display: flex; flex-direction: column; gap: 1.1rem; max-width: 48rem; margin: 0 auto; }
#chat .turns:empty::before { content: attr(data-placeholder); color: var(--body-text-color-subdued);
  margin: 22vh auto 0; }
.message { line-height: 1.55; overflow-wrap: anywhere; color: var(--body-text-color); }
.message.user { align-self: flex-end; max-width: 85%; background: var(--background-fill-secondary);
  border: 1px solid var(--border-color-primary); border-radius: 14px 14px 4px 14px; padding: .5rem .9rem; }
.message .plain { white-space: pre-wrap; }
.message .content > :first-child { margin-top: 0; }
.message .content > :last-child { margin-bottom: 0; }
.message p, .message ul, .message ol, .message pre, .message table, .message blockquote, .message .math {
  margin: .7em 0; }
.message ul { list-style: disc; padding-left: 1.5em; }
.message ol { list-style: decimal; padding-left: 1.5em; }
.message h3, .message h4, .message h5, .message h6 { font-weight: 650; margin: 1.1em 0 .4em; font-size: 1.05em; }
.message h3 { font-size: 1.2em; }
.message blockquote { border-left: 3px solid var(--border-color-primary); padding-left: .9em;
  color: var(--body-text-color-subdued); }
.message code { font-family: var(--font-mono); font-size: .88em; background: var(--background-fill-secondary);
  border-radius: 4px; padding: .1em .3em; }
.message pre { background: var(--background-fill-secondary); border: 1px solid var(--border-color-primary);
  border-radius: 8px; padding: .8em 1em; overflow-x: auto; line-height: 1.45; }
.message pre code { background: none; padding: 0; white-space: pre; overflow-wrap: normal; }
.message table { border-collapse: collapse; display: block; overflow-x: auto; }
.message th, .message td { border: 1px solid var(--border-color-primary); padding: .3em .7em; }
.message th { background: var(--background-fill-secondary); text-align: left; }
.message .math { overflow-x: auto; overflow-y: hidden; }
.message a { color: var(--link-text-color); text-decoration: underline; cursor: pointer; }
.message .host, .message .image { color: var(--body-text-color-subdued); font-size: .9em; }
.message .figures, .message .problem { font-size: .8rem; margin-top: .35rem; }
.message .problem { font-weight: 600; font-size: .95rem; }
.message .actions { display: flex; gap: .25rem; margin-top: .25rem; }
.message .actions button { font-size: .75rem; padding: .15rem .5rem; border-radius: 5px;
  color: var(--body-text-color-subdued); background: none; border: 1px solid transparent; }
.message .actions button:hover, .message .actions button:focus-visible { border-color: var(--border-color-primary);
  color: var(--body-text-color); }
.message textarea { width: 100%; min-width: 16rem; min-height: 4rem; font: inherit; color: inherit; padding: .5rem;
  background: var(--background-fill-primary); border: 1px solid var(--border-color-primary); border-radius: 6px; }
""" + highlight_css()

# Runs once, when the component is in the page. `element`, `props`, `trigger` and `watch` are Gradio's.
SCRIPT = """
const labels = LABELS;
const root = () => element.querySelector('.turns'), pane = element.closest('#chat') || element;
const button = (action, text) => {
  const made = document.createElement('button');
  made.type = 'button'; made.dataset.action = action; made.textContent = text || labels[action];
  made.setAttribute('aria-label', text || labels[action]);
  return made;
};
const build = turn => {
  const made = document.createElement('div');
  made.className = 'message ' + (turn.role === 'user' ? 'user' : 'bot');
  const content = document.createElement('div');
  content.className = turn.problem ? 'content problem' : 'content';
  content.innerHTML = turn.html;
  made.append(content);
  if (turn.figures) {
    const figures = document.createElement('div');
    figures.className = 'figures'; figures.textContent = turn.figures;
    made.append(figures);
  }
  const actions = document.createElement('div');
  actions.className = 'actions';
  actions.append(...turn.actions.map(each => button(each)));
  if (turn.actions.length) made.append(actions);
  return made;
};
const render = () => {
  const turns = JSON.parse(props.value || '[]'), place = root();
  if (!place) return;
  const below = pane.scrollHeight - pane.scrollTop - pane.clientHeight < 80;
  turns.forEach((turn, index) => {
    const key = JSON.stringify(turn), old = place.children[index];
    if (old && old.key === key) return;
    const made = build(turn);
    made.key = key; made.raw = turn.raw;
    old ? old.replaceWith(made) : place.append(made);
  });
  while (place.children.length > turns.length) place.lastChild.remove();
  if (below) pane.scrollTop = pane.scrollHeight;
};
const indexOf = node => [...root().children].indexOf(node.closest('.message'));
const open = link => {
  const url = link.dataset.url;
  if (/^(https?|mailto):/i.test(url) && confirm('Open this address from the conversation?\\n\\n' + url))
    window.open(url, '_blank', 'noopener,noreferrer');
};
const edit = message => {
  const box = document.createElement('textarea'), content = message.querySelector('.content');
  box.value = message.raw; box.setAttribute('aria-label', 'Edit the question');
  const actions = document.createElement('div');
  actions.className = 'actions';
  actions.append(button('submit', 'Submit'), button('cancel', 'Cancel'));
  content.replaceChildren(box, actions);
  message.querySelector(':scope > .actions')?.remove();
  message.key = '';
  box.focus();
};
const act = (action, message) => {
  if (action === 'copy') navigator.clipboard.writeText(message.raw);
  else if (action === 'edit') edit(message);
  else if (action === 'cancel') render();
  else if (action === 'submit')
    trigger('edit', {index: indexOf(message), value: message.querySelector('textarea').value});
  else trigger(action);
};
element.addEventListener('click', event => {
  const pressed = event.target.closest('button[data-action]'), link = event.target.closest('a[data-url]');
  if (pressed) act(pressed.dataset.action, pressed.closest('.message'));
  else if (link) open(link);
});
element.addEventListener('keydown', event => {
  const link = event.target.closest('a[data-url]');
  if (link && event.key === 'Enter') open(link);
  if (event.target.tagName !== 'TEXTAREA') return;
  if (event.key === 'Escape') render();
  if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) act('submit', event.target.closest('.message'));
});
watch('value', render);
render();
"""


def component(placeholder: str) -> Any:
    """The component; its value is what `messages` gives.

    Args:
        placeholder: What an empty conversation shows.
    """
    import gradio as gr

    return gr.HTML(
        "[]",
        html_template='<div class="turns" data-placeholder="${placeholder}"></div>',
        js_on_load=SCRIPT.replace("LABELS", json.dumps(ACTIONS)),
        placeholder=placeholder,
        elem_id="chat",
        padding=False,
        apply_default_css=False,
    )


def messages(view: View) -> str:
    """A conversation as the component takes it."""
    shown: list[dict[str, Any]] = []
    turns = view.conversation.turns
    for index, turn in enumerate(turns):
        is_last = index + 1 == len(turns)
        actions = ["copy"]
        if turn.role == "user" and not view.working:
            actions.append("edit")
        if is_last and not view.problem:
            actions += ["clear"] if view.working else ["retry", "undo", "clear"]
        answer = turn.role == "assistant"
        html = as_html(turn.content) if answer else as_text(turn.content)
        figures = figures_line(turn.figures) if turn.figures and answer else ""
        shown.append({"role": turn.role, "html": html, "raw": turn.content, "figures": figures, "actions": actions})
    line = {"role": "assistant", "raw": "", "figures": "", "actions": []}
    if view.problem:
        problem = " ".join(view.problem.split())
        shown.append({**line, "html": as_text(problem), "problem": True, "actions": ["retry", "undo", "clear"]})
    elif view.working and (not shown or shown[-1]["role"] == "user"):
        waiting = "…" if view.ahead is None else f"{view.ahead} ahead of you"
        shown.append({**line, "html": as_text(waiting)})
    return json.dumps(shown)
