"""Messages as HTML: hostile ones stay text, honest ones look as CommonMark says, and none is changed."""

from __future__ import annotations

import json
import re
import time
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.hostile import corpus

from ov_afm.chat.conversation import Conversation, Turn
from ov_afm.chat.session import View
from ov_afm.chat.web.conversation_view import messages
from ov_afm.chat.web.rendering import ATTRIBUTES, TAGS, as_html, as_text

pytest.importorskip("nh3")


class Elements(HTMLParser):
    """The elements of a page, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep an element."""
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        """Keep text."""
        self.text += data


def test_the_corpus_is_large() -> None:
    assert len(set(corpus())) > 500


def test_hostile_messages_have_only_elements_of_prose() -> None:
    for evil in corpus():
        for page in (as_html(evil), as_text(evil)):
            for tag, attributes in Elements(page).elements:
                assert tag in TAGS, (evil, page)
                assert set(attributes) <= ATTRIBUTES.get(tag, set()), (evil, page)
                assert re.match(r"(https?|mailto):", attributes.get("data-url") or "http:"), (evil, page)
                assert re.fullmatch(r"(text-align:\s?(left|right|center);?)?", attributes.get("style") or ""), page


def test_a_message_of_any_form_is_rendered_soon() -> None:
    for evil in corpus()[-7:]:
        begun = time.perf_counter()
        as_html(evil + " ")
        assert time.perf_counter() - begun < 5


@given(st.text())
def test_what_is_copied_and_edited_is_the_text_itself(text: str) -> None:
    view = View(Conversation(turns=[Turn("user", text), Turn("assistant", text)]))
    question, answer = json.loads(messages(view))
    assert question["raw"] == answer["raw"] == text
    shown = Elements(question["html"]).text
    assert shown.replace("\r\n", "\n").replace("\r", "\n") == text.replace("\r\n", "\n").replace("\r", "\n")


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("**a** *b* `List<String>`", "<strong>a</strong> <em>b</em> <code>List&lt;String&gt;"),
        ("    a < b", "<code>a &lt; b"),
        ("a <b> c & d", "a &lt;b&gt; c &amp; d"),
        ("# Title\n## Part", "<h3>Title</h3>\n<h4>Part</h4>"),
        ("| a |\n|--:|\n| 1 |", '<td style="text-align:right">1</td>'),
        ("```python\nx = 1\n```", '<span class="n">x</span>'),
        ("```nosuch\n<x>\n```", '<pre data-language="nosuch"><code>&lt;x&gt;\n</code></pre>'),
        ("3. c\n4. d", '<ol start="3">'),
        ("~~gone~~", "<s>gone</s>"),
    ],
)  # fmt: skip
def test_markdown_is_drawn(text: str, html: str) -> None:
    assert html in as_html(text)


@pytest.mark.parametrize(
    "text",
    [r"\(x^2\)", "$x^2$", "so \\[x^2\\] then", "\\[\nx^2\n=\n4\n\\]", "$$\nx^2\n$$", r"- item \(x^2\)"],
    ids=["parentheses", "dollar", "brackets-within", "brackets", "dollars", "list"],
)
def test_every_form_of_latex_is_drawn(text: str) -> None:
    html = as_html(text)
    assert "<msup><mi>x</mi><mn>2</mn></msup>" in html
    assert "<h" not in html


@pytest.mark.parametrize("text", ["It costs $5 or $10.", r"`\(x\)`", "```\n$x$\n```", r"a \( b", "$ x $"])
def test_other_dollars_and_brackets_stay(text: str) -> None:
    assert "<math" not in as_html(text)


def test_links_say_where_they_lead_and_have_no_address_to_follow() -> None:
    html = as_html("[docs](https://docs.example/x) <https://a.example/b> [good.example](http://bad.example/)")
    assert "href" not in html
    assert ">docs</a>" in html
    assert "(docs.example)" in html
    assert "(bad.example)" in html
    assert html.count("(a.example)") == 0


def test_a_very_long_message_is_shown_as_it_is() -> None:
    assert as_html("*a* " * 60_000).startswith('<div class="plain">*a* *a*')
