"""Links in the documents lead somewhere, and the schemas they describe are those of real files."""

from __future__ import annotations

import json
import re
import unicodedata
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
# [text](target) and ![text](target), the target without a title.
LINK = re.compile(r"\]\(([^()\s]+(?:\([^()\s]*\)[^()\s]*)*)\)")


def prose(text: str) -> str:
    """A document without its code, where brackets and parentheses are no links."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^( *)(```|~~~).*?^\1\2", "", text, flags=re.MULTILINE | re.DOTALL))


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to a document's headings."""
    names: set[str] = set()
    fenced = re.sub(r"^( *)(```|~~~).*?^\1\2", "", text, flags=re.MULTILINE | re.DOTALL)
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", fenced, re.MULTILINE):
        shown = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
        kept = [
            c for c in shown if c in "- " or unicodedata.category(c)[0] in "LM" or unicodedata.category(c) in "NdPc"
        ]
        name = "".join(kept).replace(" ", "-")
        same = sum(other == name or re.fullmatch(rf"{re.escape(name)}-\d+", other) is not None for other in names)
        names.add(f"{name}-{same}" if same else name)
    return names | set(re.findall(r'<a (?:id|name)="([^"]+)"', text))


def problems(document: Path) -> list[str]:
    """Relative links of a document to files or anchors that do not exist; nothing is fetched."""
    text = document.read_text(encoding="utf-8")
    broken = []
    for target in LINK.findall(prose(text)):
        if re.match(r"[a-z][a-z0-9+.-]*:", target):
            continue
        path, _, anchor = unquote(target).partition("#")
        file = document.parent / path if path else document
        if not file.exists():
            broken.append(f"{target}: no such file")
        elif anchor and file.suffix == ".md" and anchor not in anchors(file.read_text(encoding="utf-8")):
            broken.append(f"{target}: no such heading")
    return broken


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_relative_links_lead_somewhere(document: Path) -> None:
    assert problems(document) == []


def test_the_test_sees_a_broken_link(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# A heading: with `code`\n")
    document = tmp_path / "page.md"
    document.write_text(
        "# Page\n[good](other.md#a-heading-with-code) [good](#page) [web](https://example.org/x)\n"
        "`[code](nowhere.md)`\n```sh\n[code](nowhere.md)\n```\n"
        "![bad](missing.png) [bad](other.md#no-heading) [bad](#nothing)\n"
    )
    assert problems(document) == [
        "missing.png: no such file",
        "other.md#no-heading: no such heading",
        "#nothing: no such heading",
    ]
