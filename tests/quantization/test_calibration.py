"""Calibration data: mixed, cleaned, packed, cached, and told when they are no good."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support import tiny

from ov_afm.errors import CompressionError, ConfigError
from ov_afm.model_dir import manifest
from ov_afm.quantization import calibration
from ov_afm.quantization.self_generated import sample_texts
from ov_afm.quantization.text_filter import Cleaner

CHAT = [{"role": "user", "content": "What is the capital of France?"}, {"role": "assistant", "content": "Paris."}]
RENDERED = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\nParis.<|im_end|>\n"


@pytest.fixture
def tokenizer(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    monkeypatch.setenv("OV_AFM_CACHE", str(tmp_path_factory.mktemp("cache")))
    return AutoTokenizer.from_pretrained(tiny_checkpoint)


def write(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


def prose(start: int, characters: int) -> bytes:
    return calibration.PACKAGED_TEXT.read_text(encoding="utf-8")[start : start + characters].encode()


# -- Sources and weights


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        ("a.txt", [("a.txt", 1.0)]),
        ("a.jsonl:0.6,b.txt:0.4", [("a.jsonl", 0.6), ("b.txt", 0.4)]),
        ("packaged:3,self", [("packaged", 3.0), ("self", 1.0)]),
        (r"C:\data\a.txt", [(r"C:\data\a.txt", 1.0)]),
        (r"C:\data\a.txt:2", [(r"C:\data\a.txt", 2.0)]),
    ],
)
def test_mixtures_are_read(dataset: str, expected: list[tuple[str, float]]) -> None:
    assert [(part.name, part.weight) for part in calibration.parts(dataset)] == expected


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("none.txt", "no such calibration file: none.txt"),
        (
            "data.csv",
            "dataset 'data.csv' is unknown; give a .txt or .jsonl file, or one of packaged, self, wikitext2, c4, gsm8k",
        ),
        ("packaged:0", "the weight of calibration source packaged must be positive, found 0"),
        ("packaged:-1", "the weight of calibration source packaged must be positive, found -1"),
        ("packaged:nan", "the weight of calibration source packaged must be positive, found nan"),
        ("self,self:2", "a calibration source is named twice in 'self,self:2'; name each once, with its weight"),
    ],
)
def test_bad_source_is_refused(dataset: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        calibration.check(dataset)
    assert str(caught.value) == message


def test_weights_share_out_the_samples(tokenizer: Any, tmp_path: Path) -> None:
    first = write(tmp_path / "a.txt", prose(0, 12_000))
    second = write(tmp_path / "b.txt", prose(40_000, 12_000))
    samples, found = calibration.prepare(f"{first}:0.75,{second}:0.25", tokenizer, 8)
    assert len(samples) == 8
    assert [source["samples"] for source in found["sources"]] == [6, 2]
    assert found["name"] == "a.txt:0.75,b.txt:0.25"
    assert str(tmp_path) not in json.dumps(found)


def test_one_source_is_described_by_its_own_digest(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    _, found = calibration.prepare(write(path, prose(0, 4000)), tokenizer, 2)
    assert (found["name"], found["sha256"]) == ("a.txt", manifest.sha256(path))


def test_packaged_text_is_enough_for_the_default_number_of_samples(tokenizer: Any) -> None:
    samples, _ = calibration.prepare("packaged", tokenizer, 128)
    assert [len(sample) for sample in samples] == [calibration.SAMPLE_TOKENS] * 128


def test_prepared_data_come_from_the_cache_until_something_changes(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    first = calibration.prepare(write(path, prose(0, 4000)), tokenizer, 2)
    with monkeypatch.context() as patched:
        patched.setattr(Cleaner, "keep", lambda *_: pytest.fail("it was prepared again"))
        assert calibration.prepare(str(path), tokenizer, 2) == first
    assert calibration.prepare(write(path, prose(9000, 4000)), tokenizer, 2)[0] != first[0]


# -- Cleaning


def kept(*texts: str) -> tuple[list[str], dict[str, int]]:
    cleaner = Cleaner()
    return list(cleaner.keep(iter(texts))), cleaner.counts


def test_duplicates_near_duplicates_and_degenerate_texts_are_dropped() -> None:
    text = prose(300, 1500).decode()
    nearly = text.replace("memory", "storage", 1)
    others = ["  ", "ha " * 400, "\x00\x01\x02\x03 binary"]
    found, counts = kept(text, text.replace(" ", "  "), nearly, *others, "A short line.")
    assert found == [text, "A short line."]
    assert counts == {"texts": 7, "duplicates": 1, "near_duplicates": 1, "degenerate": 3}


def test_texts_that_only_share_a_topic_stay() -> None:
    found, _ = kept(prose(300, 1500).decode(), prose(2500, 1500).decode())
    assert len(found) == 2


# -- Bad data


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "calibration data a.txt holds 0 tokens; at least 32 are needed"),
        ("a.txt", b"hi \xff\xfe", "calibration file a.txt is not UTF-8 text (byte 3)"),
        (
            "a.txt",
            b"na " * 300,
            "calibration data a.txt holds 0 tokens; at least 32 are needed "
            "(1 pieces of text were dropped as duplicates or degenerate)",
        ),
        ("a.jsonl", b'\n{"text": "x"}\n{"txt": 1}', "a.jsonl line 3 is neither "),
        ("a.jsonl", b"[1, 2]", "a.jsonl line 1 is neither "),
        ("a.jsonl", b"3", "a.jsonl line 1 is neither "),
        ("a.jsonl", b"{", "a.jsonl line 1 is neither "),
        ("a.jsonl", b'{"messages": "hello"}', "a.jsonl line 1 is neither "),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}', "a.jsonl line 1 is neither "),
    ],
    ids=["empty", "binary", "degenerate", "no-key", "list", "number", "no-json", "messages-text", "without-content"],
)
def test_bad_calibration_data_are_named(
    tokenizer: Any, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    with pytest.raises(CompressionError) as caught:
        calibration.prepare(write(tmp_path / name, content), tokenizer, 4)
    assert str(caught.value).startswith(message)


# -- Packing


def test_chat_is_templated_once_and_with_the_models_own_template(tokenizer: Any, tmp_path: Path) -> None:
    lines = [json.dumps({"messages": CHAT}), "", json.dumps({"text": tiny.CORPUS})]
    samples, _ = calibration.prepare(write(tmp_path / "a.jsonl", "\n".join(lines).encode()), tokenizer, 3)
    assert tokenizer.decode(samples[0]).startswith(RENDERED + tiny.CORPUS[:20])


def test_texts_are_packed_and_shreds_are_dropped(tokenizer: Any, tmp_path: Path) -> None:
    samples, _ = calibration.prepare(write(tmp_path / "a.txt", prose(0, 4000)), tokenizer, 128)
    assert {len(sample) for sample in samples[:-1]} == {calibration.SAMPLE_TOKENS}
    assert len(samples[-1]) >= calibration.SAMPLE_TOKENS // 2
    assert len(calibration.prepare(str(tmp_path / "a.txt"), tokenizer, 2)[0]) == 2


# -- The model's own text


def test_model_writes_its_own_calibration_text_the_same_each_time(tokenizer: Any, tiny_fp32: Path) -> None:
    ir = tiny_fp32 / "openvino_model.xml"
    first = list(sample_texts(ir, tokenizer, 3, 40))
    assert first == list(sample_texts(ir, tokenizer, 3, 40))
    assert len(set(first)) == 3
    assert all(text.startswith("<|im_start|>user\n") for text in first)


def test_own_text_of_a_model_that_is_not_at_hand_is_refused(tokenizer: Any) -> None:
    with pytest.raises(CompressionError, match="^calibration data `self` needs the uncompressed model"):
        calibration.prepare("self", tokenizer, 2)


def test_own_text_can_be_mixed_with_other_text(tokenizer: Any, tiny_fp32: Path) -> None:
    samples, found = calibration.prepare("self,packaged", tokenizer, 2, ir=tiny_fp32 / "openvino_model.xml")
    assert len(samples) == 2
    assert [source["name"] for source in found["sources"]] == ["self", "calibration.txt"]
