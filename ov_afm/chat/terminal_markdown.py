"""Shows an answer on a terminal while it is generated, as Markdown.

Complete blocks are printed once and for all. The last, incomplete block is redrawn with each piece of text; only as
many of its lines as the window holds, because a terminal cannot redraw what has scrolled away. Control characters are
made visible, so that a model cannot control the terminal.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

__all__ = ["MarkdownStream", "complete_until", "fenced_lines", "printable"]

FENCE = re.compile(r"\s{0,3}(`{3,}|~{3,})")
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
REDRAWS_PER_S = 12


def printable(text: str) -> str:
    """Text without control characters but newline and tab; each becomes a visible mark."""
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def complete_until(text: str) -> int:
    """Where the last open Markdown block of a text begins: after the last blank line outside a code fence."""
    end = position = 0
    for line, is_code in fenced_lines(text):
        position += len(line)
        # An indented line may belong to the list above it; only what follows can tell.
        if not is_code and not line.strip() and line.endswith("\n"):
            end = position
    return end


def fenced_lines(text: str) -> Iterator[tuple[str, bool]]:
    """The lines of a Markdown text, and whether each belongs to a fenced code block, its fences included."""
    fence = ""
    for line in text.splitlines(keepends=True):
        mark = FENCE.match(line)
        yield line, bool(fence or mark)
        if not fence:
            fence = mark[1] if mark else ""
        elif mark and mark[1].startswith(fence) and not line[mark.end() :].strip():
            fence = ""


class MarkdownStream:
    """Draws a growing Markdown text.

    Args:
        console: Where to draw.

    Attributes:
        text: The text so far.
    """

    def __init__(self, console: Console) -> None:
        from rich.live import Live

        self.text = ""
        self._printed = 0
        self._live = Live(console=console, refresh_per_second=REDRAWS_PER_S, get_renderable=self._tail)

    def __enter__(self) -> MarkdownStream:
        """Start drawing."""
        self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        """Print the rest."""
        from rich.text import Text

        self._live.transient = True
        self._live.stop()
        rest = self.text[self._printed :]
        if rest.strip():
            self._live.console.print(self._markdown(rest))
        elif not self.text.strip():
            self._live.console.print(Text("(empty)", style="dim"))

    def add(self, text: str) -> None:
        """Show more text."""
        self.text += printable(text)
        end = self._printed + complete_until(self.text[self._printed :])
        block = self.text[self._printed : end]
        if block.strip():
            self._printed = end
            self._live.console.print(self._markdown(block))
            self._live.console.print()

    def _markdown(self, text: str) -> Any:
        from rich.markdown import Markdown

        return Markdown(text.strip("\n"), code_theme="ansi_dark", hyperlinks=False)

    def _tail(self) -> Any:
        return Tail(self._markdown(self.text[self._printed :]))


class Tail:
    """As many of the last lines of something as the window holds."""

    def __init__(self, content: Any) -> None:
        self._content = content

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw it."""
        from rich.segment import Segment

        lines = console.render_lines(self._content, options, pad=False)
        for line in lines[-(console.height - 2) :]:
            yield from line
            yield Segment.line()
