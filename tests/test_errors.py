"""The error tree: one base, a stable code for each error."""

from __future__ import annotations

import pickle

import pytest

from ov_afm import errors


@pytest.mark.parametrize("name", [name for name in errors.__all__ if name != "last_line"])
def test_every_error_has_a_code_and_crosses_processes(name: str) -> None:
    kind = getattr(errors, name)
    assert issubclass(kind, errors.OVAFMError)
    assert kind("a").code == kind.default_code
    copy = pickle.loads(pickle.dumps(kind("a", code="b")))
    assert (type(copy), str(copy), copy.code) == (kind, "a", "b")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Exception from src/a.cpp:3:\nCheck failed at b:\n\nthe reason\n", "the reason"),
        ("the reason\nException from src/a.cpp:3:", "the reason"),
        ("", "RuntimeError"),
    ],
    ids=["last", "place-last", "none"],
)
def test_reason_of_an_openvino_error(text: str, reason: str) -> None:
    assert errors.last_line(RuntimeError(text)) == reason
