"""Messages as HTML: one parse of the Markdown, and an allow-list behind it.

markdown-it-py parses by CommonMark's rules, with HTML switched off, so that tags in a message become visible text. nh3
then lets pass only what the parser itself writes. Pictures are named, not fetched; links have no address of their own
that a click could follow: the page asks first (`conversation_view`). LaTeX becomes MathML, which browsers draw.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from xml.etree import ElementTree

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.rules_block import StateBlock
    from markdown_it.rules_inline import StateInline
    from markdown_it.token import Token

__all__ = ["as_html", "as_text", "highlight_css"]

# Longer messages are shown as they are: parsing them would hold up the page.
MAX_CHARACTERS = 200_000
MAX_CODE_CHARACTERS = 50_000
MAX_MATH_CHARACTERS = 5_000
MAX_MATH_LINES = 40
SCHEMES = ("http", "https", "mailto")
MATH = """math mfrac mi mn mo mover mpadded mphantom mroot mrow ms mspace msqrt mstyle msub msubsup msup mtable mtd
    mtext mtr munder munderover menclose mmultiscripts"""
MATH_TAGS = frozenset(MATH.split())
PROSE = "p br hr em strong s code pre blockquote ul ol li table thead tbody tr th td h3 h4 h5 h6 a span div"
TAGS = MATH_TAGS | frozenset(PROSE.split())
MATH_ATTRIBUTES = """accent accentunder columnalign columnlines columnspacing depth display displaystyle fence form
    height linethickness lspace mathvariant maxsize minsize movablelimits notation rowlines rowspacing rspace
    scriptlevel separator stretchy symmetric voffset width"""
ATTRIBUTES = {
    **{tag: set(MATH_ATTRIBUTES.split()) for tag in MATH_TAGS},
    "a": {"data-url", "role", "tabindex", "title"},
    "code": {"class"},
    "div": {"class"},
    "ol": {"start"},
    "pre": {"class", "data-language"},
    "span": {"class"},
    "td": {"style"},
    "th": {"style"},
}


def as_text(text: str) -> str:
    """Text from outside as HTML that shows it as it is."""
    return f'<div class="plain">{escape(text)}</div>'


@functools.lru_cache(maxsize=512)
def as_html(text: str) -> str:
    """Markdown from outside as safe HTML.

    Args:
        text: What a model wrote, whole or so far.
    """
    import nh3

    if len(text) > MAX_CHARACTERS:
        return as_text(text)
    return nh3.clean(
        _parser().render(text),
        tags=set(TAGS),
        attributes=ATTRIBUTES,
        url_schemes=set(),
        link_rel=None,
        filter_style_properties={"text-align"},
    )


def highlight_css() -> str:
    """The colours of highlighted code, light and dark."""
    from pygments.formatters import HtmlFormatter

    light = HtmlFormatter(style="xcode", nowrap=True).get_style_defs(".message pre")
    dark = HtmlFormatter(style="github-dark", nowrap=True).get_style_defs(".dark .message pre")
    return "\n".join(line for line in f"{light}\n{dark}".splitlines() if " ." in line and "{" in line)


@functools.cache
def _parser() -> MarkdownIt:
    from markdown_it import MarkdownIt
    from mdit_py_plugins.dollarmath import dollarmath_plugin

    parser = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
    parser.use(dollarmath_plugin, allow_digits=False, allow_space=False, double_inline=True)
    parser.block.ruler.before("fence", "bracket_math", _math_block, {"alt": ["paragraph", "blockquote", "list"]})
    parser.inline.ruler.before("escape", "bracket_math", _math_inline)
    parser.validateLink = lambda url: urlsplit(url).scheme.lower() in SCHEMES  # type: ignore[method-assign]
    rules: dict[str, Any] = vars(parser.renderer)["rules"]
    rules.update(
        link_open=_link_open,
        link_close=_link_close,
        image=_image,
        heading_open=_heading,
        heading_close=_heading,
        fence=_fence,
        code_block=_fence,
        math_inline=_math,
        math_inline_double=_math,
        math_block=_math,
        math_block_label=_math,
    )
    return parser


# -- LaTeX in \(...\) and \[...\]; that in dollars is read by a plugin


def _math_inline(state: StateInline, silent: bool) -> bool:
    for begin, end, kind in (("\\(", "\\)", "math_inline"), ("\\[", "\\]", "math_inline_double")):
        if state.src.startswith(begin, state.pos):
            limit = min(state.posMax, state.pos + MAX_MATH_CHARACTERS)
            place = state.src.find(end, state.pos + 2, limit)
            if place < 0:
                return False
            if not silent:
                token = state.push(kind, "math", 0)
                token.content = state.src[state.pos + 2 : place]
            state.pos = place + 2
            return True
    return False


def _math_block(state: StateBlock, first: int, last: int, silent: bool) -> bool:
    r"""Lines from one that begins with \[ to one that ends with \]: a line of `=` between them is no heading."""
    line = state.src[state.bMarks[first] + state.tShift[first] : state.eMarks[first]]
    if state.is_code_block(first) or not line.startswith("\\["):
        return False
    for number in range(first, min(last, first + MAX_MATH_LINES)):
        text = state.src[state.bMarks[number] : state.eMarks[number]].rstrip()
        if text.endswith("\\]"):
            if not silent:
                begin = state.bMarks[first] + state.tShift[first] + 2
                token = state.push("math_block", "math", 0)
                token.content = state.src[begin : state.bMarks[number] + len(text) - 2]
                token.map = [first, number + 1]
            state.line = number + 1
            return True
    return False


def _math(tokens: Sequence[Token], index: int, *_: Any) -> str:
    token = tokens[index]
    display = token.type != "math_inline"
    drawn = _mathml(token.content, display)
    return f'<div class="math">{drawn}</div>' if token.type.startswith("math_block") else drawn


@functools.lru_cache(maxsize=512)
def _mathml(latex: str, display: bool) -> str:
    """LaTeX as MathML, or as code where it cannot be read."""
    from latex2mathml.converter import convert

    code = f"<code>{escape(latex.strip())}</code>"
    if len(latex) > MAX_MATH_CHARACTERS:
        return code
    try:
        drawn = str(convert(latex.strip(), display="block" if display else "inline"))
        # The converter does not escape what stands in \\text{...}.
        tags = {element.tag.rpartition("}")[2] for element in ElementTree.fromstring(drawn).iter()}
    except Exception:  # noqa: BLE001 - the converter raises whatever it stumbles over
        return code
    return drawn if tags <= MATH_TAGS else code


# -- Rules of the renderer


def _link_open(tokens: Sequence[Token], index: int, *_: Any) -> str:
    url = str(tokens[index].attrGet("href") or "")
    return f'<a role="link" tabindex="0" data-url="{escape(url)}" title="{escape(url)}">'


def _link_close(tokens: Sequence[Token], index: int, *_: Any) -> str:
    """Where the link leads, because its text may say something else."""
    level, opening = 0, index
    for opening in range(index - 1, -1, -1):
        level += {"link_open": 1, "link_close": -1}.get(tokens[opening].type, 0)
        if level == 1:
            break
    url = str(tokens[opening].attrGet("href") or "")
    host = urlsplit(url).netloc or url.partition(":")[2]
    shown = "".join(each.content for each in tokens[opening:index])
    return "</a>" + ("" if host in shown else f' <span class="host">({escape(host)})</span>')


def _image(tokens: Sequence[Token], index: int, *_: Any) -> str:
    return f'<span class="image">[picture, not fetched: {escape(tokens[index].content)}]</span>'


def _heading(tokens: Sequence[Token], index: int, *_: Any) -> str:
    token = tokens[index]
    # The page has the first two levels.
    tag = f"h{min(6, int(token.tag[1]) + 2)}"
    return f"<{tag}>" if token.nesting == 1 else f"</{tag}>\n"


def _fence(tokens: Sequence[Token], index: int, *_: Any) -> str:
    token = tokens[index]
    language = re.sub(r"[^\w+#.-]", "", token.info.split(maxsplit=1)[0] if token.info.split() else "")[:20]
    code = _highlight(token.content, language) or escape(token.content)
    return f'<pre data-language="{escape(language)}"><code>{code}</code></pre>\n'


def _highlight(code: str, language: str) -> str:
    """Code with its words in spans; empty for a language that is not known."""
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import get_lexer_by_name
    from pygments.util import ClassNotFound

    if not language or len(code) > MAX_CODE_CHARACTERS:
        return ""
    try:
        lexer = get_lexer_by_name(language, stripnl=False, ensurenl=False)
    except ClassNotFound:
        return ""
    return str(highlight(code, lexer, HtmlFormatter(nowrap=True)))
