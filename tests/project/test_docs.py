"""Links in the documents lead somewhere, and the schemas they describe are those of real files."""

from __future__ import annotations

import json
import pkgutil
import re
import unicodedata
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple
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


CODE_NAME = re.compile(r"`((?:ov_afm/)?[a-z_]+(?:/[a-z_]+)*\.py|[a-z_]+(?:\.\w+)+)(?:\(\))?`")


@pytest.mark.parametrize("name", sorted(set(CODE_NAME.findall((ROOT / "docs/architecture.md").read_text("utf-8")))))
def test_names_in_the_architecture_exist(name: str) -> None:
    if name.endswith(".py"):
        assert (ROOT / name).is_file() or (ROOT / "ov_afm" / name).is_file()
    elif (ROOT / "ov_afm" / name.partition(".")[0]).exists() or (
        ROOT / "ov_afm" / f"{name.partition('.')[0]}.py"
    ).exists():
        pkgutil.resolve_name(f"ov_afm.{name}")


# Names of the documented types; `object` and `list` may be left without fields of their own.
TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "object": (dict,),
    "list": (list,),
    "null": (type(None),),
}


class Field(NamedTuple):
    """A row of a table in docs/model-directory.md; a field without a condition is in every manifest."""

    type: str
    example: str
    condition: str


def documented() -> dict[str, Field]:
    text = (ROOT / "docs" / "model-directory.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in text.splitlines()]
    return {
        row[0].strip("`"): Field(row[1], row[2].strip("`"), row[4]) for row in rows if len(row) == 5 and "`" in row[0]
    }


def walk(value: Any, name: str, fields: Collection[str]) -> Iterator[tuple[str, Any]]:
    """Every field of a manifest under its documented name; not the inside of objects and lists that have no rows."""
    if name:
        yield name, value
    if isinstance(value, dict):
        for key, item in value.items():
            named = f"{name}.{key}" if name else key
            if f"{name}.*" in fields:
                yield from walk(item, f"{name}.*", fields)
            elif not name or any(other.startswith(f"{name}.") for other in fields):
                yield from walk(item, named, fields)
    elif isinstance(value, list) and any(other.startswith(f"{name}[]") for other in fields):
        for item in value:
            for key, part in item.items():
                yield from walk(part, f"{name}[].{key}", fields)


def is_of_type(value: Any, type_name: str) -> bool:
    if type_name.startswith("list of "):
        element = type_name.removeprefix("list of ").removesuffix("s")
        return isinstance(value, list) and all(is_of_type(item, element) for item in value)
    allowed = {kind for name in type_name.split(" or ") for kind in TYPES[name]}
    return type(value) in allowed


def test_manifest_of_an_export_is_as_documented(tiny_model: Path) -> None:
    fields = documented()
    manifest = json.loads((tiny_model / "ov_afm.json").read_text(encoding="utf-8"))
    found = dict(walk(manifest, "", fields))
    assert set(found) - set(fields) == set(), "fields that docs/model-directory.md does not have"
    always = {name for name, field in fields.items() if not field.condition}
    assert always - set(found) == set(), "fields that docs/model-directory.md has in every manifest"
    assert {name: value for name, value in found.items() if not is_of_type(value, fields[name].type)} == {}


def test_examples_in_the_schema_are_of_their_type() -> None:
    for name, field in documented().items():
        # Strings may be cut short, the rest is JSON.
        value = field.example if field.example.startswith('"') else json.loads(field.example or "null")
        assert not field.example or is_of_type(value, field.type) or field.type == "list of strings", name


def test_the_test_sees_a_field_without_a_description() -> None:
    fields = {"source", "source.kind", "files", "files.*", "files.*.bytes"}
    manifest = {"source": {"kind": "hub", "new": 1}, "extra": 2, "files": {"a.b": {"bytes": 1, "time": 2}}}
    assert dict(walk(manifest, "", fields)).keys() - fields == {"source.new", "extra", "files.*.time"}
