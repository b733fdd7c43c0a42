"""The packaged evaluation text."""

from __future__ import annotations

import re

from ov_afm.evaluation.text import DEFAULT_TEXT, load_text


def test_evaluation_text_shares_no_passage_with_calibration_text() -> None:
    root = DEFAULT_TEXT.parents[2]

    def passages(text: str) -> set[tuple[str, ...]]:
        words = re.findall(r"\w+", text.lower())
        return {tuple(words[at : at + 8]) for at in range(len(words) - 7)}

    mine = passages(load_text().content)
    others = [path for path in root.rglob("*") if path.suffix in (".py", ".txt", ".md", ".jsonl")]
    for path in others:
        if path != DEFAULT_TEXT:
            assert not mine & passages(path.read_text(encoding="utf-8")), path
    assert len(mine) > 3000
