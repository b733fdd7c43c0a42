"""Conversations: what fits the context, the file that keeps them, export and import."""

from __future__ import annotations

import json
import sqlite3
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from ov_afm import Pipeline
from ov_afm.chat.backend import Local, fit
from ov_afm.chat.conversation import Conversation, Turn, from_json, to_json, to_markdown
from ov_afm.chat.store import Store
from ov_afm.errors import ConfigError, OVAFMError
from ov_afm.runtime.sampling import Params


def messages(*contents: str) -> list[dict[str, str]]:
    return [{"role": "user" if index % 2 == 0 else "assistant", "content": text} for index, text in enumerate(contents)]


def letters(each: Any) -> int:
    return sum(len(message["content"]) for message in each)


def test_oldest_turns_go_first_and_the_system_prompt_stays() -> None:
    system = {"role": "system", "content": "sss"}
    talk = messages("aaaa", "bbbb", "cccc", "dddd", "ee")
    assert fit([system, *talk], letters, 100) == ([system, *talk], 0)
    assert fit([system, *talk], letters, 13) == ([system, *talk[2:]], 2)
    assert fit([system, *talk], letters, 5) == ([system, talk[-1]], 4)
    assert fit([system, *talk], letters, 1) == ([system, talk[-1]], 4)


def test_a_full_context_drops_turns_and_says_so(tiny_model: Path) -> None:
    with Pipeline(tiny_model, warm_up=False) as pipeline:
        backend = Local(pipeline)
        talk = messages(*["the lazy dog jumps over it " * 50] * 7)
        assert pipeline.count_tokens(talk) > pipeline.context_length - 640
        steps = list(backend.answer(talk, Params(max_new_tokens=2, greedy=True), threading.Event()))
        assert steps[-1].dropped >= 2
        assert steps[-1].metrics is not None
        assert steps[-1].metrics.prompt_tokens <= pipeline.context_length - 2
        short = list(backend.answer(talk[:1], Params(max_new_tokens=2), threading.Event()))
        assert short[-1].dropped == 0


EXAMPLE = Conversation(
    "Tides",
    "Be brief.",
    [Turn("user", "What is a tide?"), Turn("assistant", "The sea’s rise.", {"ttft_ms": 420.0, "device": "CPU"})],
)


def test_export_and_import_give_the_same_conversation() -> None:
    assert from_json(to_json(EXAMPLE)) == EXAMPLE


def test_markdown_export_has_everything() -> None:
    assert to_markdown(EXAMPLE) == (
        "# Tides\n\n> Be brief.\n\n## You\n\nWhat is a tide?\n\n## Model\n\nThe sea’s rise.\n\n"
        "*first token 0.42 s · CPU*\n"
    )


def test_openai_messages_are_imported() -> None:
    found = from_json(json.dumps([{"role": "system", "content": "x"}, *messages("a", "b")]))
    assert (found.system, [turn.content for turn in found.turns]) == ("x", ["a", "b"])


def test_invented_figures_are_left_out() -> None:
    turn = {"role": "assistant", "content": "b", "figures": {"ttft_ms": "<script>", "tokens_per_s": True, "x": 1}}
    assert from_json(json.dumps([*messages("a"), turn])).turns[1].figures is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "this is not a conversation: not JSON"),
        ("3", "this is not a conversation: messages must be a list, found int"),
        ('{"messages": [], "title": 3}', "this is not a conversation: title must be text, found 3"),
        ('{"messages": [], "ov_afm_chat": 9}', "this conversation has layout 9, this ov_afm reads up to 1; upgrade it"),
        (
            '[{"role": "user"}]',
            "this is not a conversation: message 1 needs a role (system, user or assistant) and a text as content",
        ),
        (
            '[{"role": "assistant", "content": "x"}]',
            "this is not a conversation: message 1 must be of role user, found assistant",
        ),
    ],
    ids=["not-json", "number", "title", "newer", "no-content", "order"],
)
def test_what_is_no_conversation_is_refused(text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as refused:
        from_json(text)
    assert str(refused.value).startswith(expected)


def test_conversations_survive_and_belong_to_their_owner(tmp_path: Path) -> None:
    store = Store(tmp_path / "chat.sqlite")
    first = store.add("ann", EXAMPLE)
    second = store.add("ann", Conversation(turns=[Turn("user", "Hello there")]))
    store.add("bob", Conversation("Bob's"))
    store.close()
    again = Store(tmp_path / "chat.sqlite")
    assert again.get("ann", first) == EXAMPLE
    assert again.get("bob", first) is None
    assert [(entry.id, entry.name) for entry in again.entries("ann")] == [(second, "Hello there"), (first, "Tides")]
    again.save("bob", first, Conversation("stolen"))
    assert again.get("ann", first) == EXAMPLE
    again.delete("bob", first)
    again.delete("ann", first)
    assert [entry.id for entry in again.entries("ann")] == [second]
    again.save("ann", first, EXAMPLE)
    assert again.get("ann", first) is None


@pytest.mark.skipif(sys.platform == "win32", reason="Windows keeps other users out by the folder")
def test_only_this_user_reads_the_conversations(tmp_path: Path) -> None:
    Store(tmp_path / "chat.sqlite").close()
    assert (tmp_path / "chat.sqlite").stat().st_mode & 0o077 == 0


def test_damaged_and_newer_files_are_refused(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.sqlite"
    damaged.write_bytes(b"no database at all" * 100)
    with pytest.raises(OVAFMError, match=r"cannot be read: .*; move that file away, or set OV_AFM_DATA"):
        Store(damaged)
    newer = tmp_path / "newer.sqlite"
    base = sqlite3.connect(newer)
    base.execute("PRAGMA user_version = 9")
    base.close()
    with pytest.raises(OVAFMError, match="has layout 9, this ov_afm reads up to 1; upgrade it"):
        Store(newer)


def test_many_threads_and_chats_write_at_once(tmp_path: Path) -> None:
    stores = [Store(tmp_path / "chat.sqlite") for _ in range(2)]
    threads = [threading.Thread(target=stores[each % 2].add, args=("ann", EXAMPLE)) for each in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(store.entries("ann")) for store in stores] == [16, 16]


def test_a_full_disk_is_told_and_nothing_is_lost(tmp_path: Path) -> None:
    store = Store(tmp_path / "chat.sqlite")
    number = store.add("ann", EXAMPLE)
    (pages,) = store._connection.execute("PRAGMA page_count").fetchone()
    store._connection.execute(f"PRAGMA max_page_count = {pages}")
    longer = Conversation("Tides", turns=[*EXAMPLE.turns, Turn("user", "more " * 10_000)])
    with pytest.raises(OVAFMError) as refused:
        store.save("ann", number, longer)
    assert str(refused.value) == (
        f"{tmp_path / 'chat.sqlite'} cannot be used: database or disk is full; "
        "make room there, or name another folder with OV_AFM_DATA"
    )
    assert store.get("ann", number) == EXAMPLE
