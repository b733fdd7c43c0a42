"""Reasoning: the tags between which a model thinks before it answers.

A model that thinks writes `<think>`, its thoughts, `</think>` and the answer. Which tags it has is nowhere declared;
its chat template and its vocabulary show them.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from .chat_template import ChatTemplate

__all__ = ["KNOWN", "Tags", "reasoning_tags"]


class Tags(NamedTuple):
    """What thoughts begin and end with."""

    begin: str
    end: str


# Qwen, DeepSeek, SmolLM3 and most others; Granite, Mistral, Seed, Kimi, EXAONE.
KNOWN = (
    Tags("<think>", "</think>"),
    Tags("<thinking>", "</thinking>"),
    Tags("[THINK]", "[/THINK]"),
    Tags("<seed:think>", "</seed:think>"),
    Tags("◁think▷", "◁/think▷"),
    Tags("<thought>", "</thought>"),
)


def reasoning_tags(template: ChatTemplate | None, tokens: Collection[str]) -> Tags | None:
    """The tags of a model; None where it has none.

    Args:
        template: Its chat template.
        tokens: Texts that its tokenizer recognizes as a whole.
    """
    text = "" if template is None else template.text
    # A template that cuts earlier thoughts names their end alone.
    named = [tags for tags in KNOWN if tags.end in text]
    recognized = [tags for tags in KNOWN if tags.begin in tokens and tags.end in tokens]
    return next(iter(named + recognized), None)
