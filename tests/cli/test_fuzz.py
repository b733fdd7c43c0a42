"""Whatever the files of a model say, a command ends with one line or with success, and writes nowhere but its output.

Hypothesis changes the JSON files, the safetensors headers and the GGUF metadata of a model that is whole, a field or
some bytes at a time, and runs the real command on it, in this process and up to the engine or to the child process that
converts. In the suite the examples are the same every time and end after a few seconds; this looks for new ones, for
ten minutes a command:

    OV_AFM_FUZZ_SECONDS=600 python -m pytest tests/cli/test_fuzz.py -k info
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st
from support import adapters, tiny

from ov_afm.cli import main
from ov_afm.conversion import upload
from ov_afm.errors import OVAFMError
from ov_afm.model_dir import manifest
from ov_afm.system.child_process import ChildProcess

pytestmark = pytest.mark.slow

SECONDS = float(os.environ.get("OV_AFM_FUZZ_SECONDS", "0"))
# Time for one command in the suite, and the most examples in it.
SUITE_S, EXAMPLES = 0.8, 120
fuzz = hypothesis.settings(
    max_examples=int(EXAMPLES * max(1.0, SECONDS / SUITE_S)),
    derandomize=not SECONDS,
    deadline=None,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([2**31, 2**63, -(2**64), 10**30, 1e308, float("nan"), float("inf"), 0.5, -0.0]),
    st.sampled_from(
        ["", " ", "12", "nan", "\x00", "\ud800", "ünïcödé", "a/b", "../../outside", "/etc/passwd", "{{", "x" * 300]
    ),
    st.sampled_from([[], {}, [None], [[]], [{}], {"": None}, {"a": {}}, ["a", 1], [-1, 2**70]]),
).map(copy.deepcopy)  # A list that is put into two documents must not be shared by them.
BYTES = st.one_of(
    st.binary(max_size=20),
    st.sampled_from(
        [b"", b"[]", b"null", b"1", b'"x"', b"\xff\xfe{}", b"\xef\xbb\xbf{}", b"[" * 100_000, b'{"a":' * 50_000]
    ),
)
Value = Any


class Stopped(OVAFMError):
    """The command came as far as the fuzz goes."""

    default_code = "stopped"


def paths(value: Value, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where each value of a JSON document is; of a long list the first ones only."""
    if place:
        yield place
    inside = value.items() if isinstance(value, dict) else enumerate(value[:4]) if isinstance(value, list) else ()
    for key, each in inside:
        yield from paths(each, (*place, key))


@st.composite
def changed(draw: st.DrawFn, document: Value) -> Value:
    """A JSON document with one to three values replaced, deleted or added."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        places = list(paths(document))
        if not places:
            break
        *way, last = draw(st.sampled_from(places))
        parent = document
        for key in way:
            parent = parent[key]
        action = draw(st.sampled_from(["replace", "replace", "delete", "add"]))
        if action == "delete":
            del parent[last]
        elif action == "add" and isinstance(parent, dict):
            parent[draw(st.sampled_from(["", "../x", "é", "eos_token_id", "auto_map", str(last).upper()]))] = draw(
                VALUES
            )
        else:
            parent[last] = draw(VALUES)
    return document


def json_files(documents: Mapping[str, Value]) -> st.SearchStrategy[tuple[str, bytes]]:
    """The name of one of the files, and other contents for it: a changed document, or bytes that are none."""

    def contents(name: str) -> st.SearchStrategy[tuple[str, bytes]]:
        text = changed(documents[name]).map(lambda value: json.dumps(value).encode())
        return st.tuples(st.just(name), st.one_of(text, text, text, BYTES))

    return st.sampled_from(sorted(documents)).flatmap(contents)


def broken(data: bytes, span: int) -> st.SearchStrategy[bytes]:
    """Bytes with some among the first ones changed, or cut short."""

    def change(edits: list[tuple[int, int]]) -> bytes:
        copied = bytearray(data)
        for place, value in edits:
            copied[place] = value
        return bytes(copied)

    edits = st.lists(st.tuples(st.integers(0, min(span, len(data)) - 1), st.integers(0, 255)), min_size=1, max_size=8)
    return st.one_of(edits.map(change), st.integers(0, len(data)).map(lambda end: data[:end]))


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of each file below a folder."""
    files = {str(path): path.stat() for path in folder.rglob("*") if path.is_file()}
    return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in files.items()}


class Commands:
    """Runs commands and judges them.

    Args:
        folder: Holds everything that may not change; `folder/out` and `folder/cache` may.
        capfd: Takes what they print.
    """

    def __init__(self, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
        self._folder, self._capfd = folder, capfd
        self._end = time.monotonic() + (SECONDS or SUITE_S)
        self._failing = False

    @property
    def over(self) -> bool:
        """Whether the time of this test is up; a failure may take longer to be made small."""
        return time.monotonic() > self._end and not self._failing

    def run(self, *arguments: str | Path) -> None:
        """Run a command; it must end with success, or with one line."""
        try:
            self._run(arguments)
        except BaseException:
            self._failing = True
            raise

    def _run(self, arguments: Sequence[str | Path]) -> None:
        self._capfd.readouterr()
        before = self._others()
        status = main([str(each) for each in arguments])
        _, printed = self._capfd.readouterr()
        errors = [line for line in printed.splitlines() if not line.startswith(("note: ", "WARNING: "))]
        assert status in (0, 1), printed
        if status:
            assert len(errors) == 1, printed
            assert errors[0].startswith("ov-afm: error: "), printed
            assert len(errors[0]) < 2000, errors[0]
        assert self._others() == before
        shutil.rmtree(self._folder / "out", ignore_errors=True)

    def _others(self) -> dict[str, tuple[int, int]]:
        allowed = tuple(str(self._folder / name) + "/" for name in ("out", "cache"))
        return {path: stat for path, stat in tree(self._folder).items() if not path.startswith(allowed)}


@pytest.fixture
def commands(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Commands:
    monkeypatch.setenv("OV_AFM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return Commands(tmp_path, capfd)


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_model, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint with an index beside its one file of weights."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, folder)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    names = json.loads(header(folder / "model-00001-of-00001.safetensors"))
    names.pop("__metadata__")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def until_the_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands stop where a child process would begin."""

    def stop(*_: object, **__: object) -> None:
        raise Stopped("the child process would begin")

    monkeypatch.setattr(ChildProcess, "run", stop)


def documents(folder: Path, *names: str) -> dict[str, Value]:
    return {name: json.loads((folder / name).read_text(encoding="utf-8")) for name in names}


def header(path: Path) -> bytes:
    """The JSON header of a safetensors file."""
    data = path.read_bytes()
    return data[8 : 8 + int.from_bytes(data[:8], "little")]


@contextlib.contextmanager
def replaced(path: Path, data: bytes) -> Iterator[None]:
    """While the block runs, a file has other contents."""
    original = path.read_bytes()
    path.write_bytes(data)
    try:
        yield
    finally:
        path.write_bytes(original)


def run_on_json(commands: Commands, folder: Path, names: tuple[str, ...], run: Callable[[], None]) -> None:
    """Run a command on a folder again and again, with one of its JSON files changed."""

    @fuzz
    @hypothesis.given(json_files(documents(folder, *names)))
    def check(change: tuple[str, bytes]) -> None:
        if commands.over:
            return
        name, data = change
        with replaced(folder / name, data):
            run()

    check()


MODEL_FILES = (manifest.FILE_NAME, "config.json", "generation_config.json", "tokenizer_config.json")


def test_info_of_any_directory(commands: Commands, model: Path) -> None:
    run_on_json(commands, model, MODEL_FILES, lambda: commands.run("info", model))


def test_generate_with_any_directory(commands: Commands, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import openvino_genai

    def no_engine(*_: object, **__: object) -> None:
        raise RuntimeError("the engine would load")

    monkeypatch.setattr(openvino_genai, "LLMPipeline", no_engine)
    run_on_json(commands, model, MODEL_FILES, lambda: commands.run("generate", model, "Hello"))


def test_kernels_of_any_directory(commands: Commands, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ov_afm.kernels import extension

    def no_library() -> Path:
        raise Stopped("the library would be loaded")

    monkeypatch.setattr(extension, "load", no_library)
    run_on_json(commands, model, MODEL_FILES, lambda: commands.run("kernels", model))


def test_upload_of_any_directory_sends_nothing_from_outside(
    commands: Commands, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: False)
    files = upload._files

    def collected(folder: Path, progress: object) -> None:
        for name in files(folder, None):
            assert (folder / name).resolve().is_relative_to(folder.resolve()), name
        raise Stopped("the files would be sent")

    monkeypatch.setattr(upload, "_files", collected)
    secret = model.parent / "outside"
    secret.write_bytes(b"secret")
    entry = {"bytes": 6, "sha256": manifest.sha256(secret)}
    for name in ("../outside", str(secret), "relu2/../../outside"):
        contents = json.loads((model / manifest.FILE_NAME).read_text())
        contents["files"][name] = entry
        with replaced(model / manifest.FILE_NAME, json.dumps(contents).encode()):
            commands.run("upload", model, "org/name")
    run_on_json(commands, model, MODEL_FILES, lambda: commands.run("upload", model, "org/name"))


CHECKPOINT_FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "model.safetensors.index.json")


def test_export_reads_any_checkpoint(commands: Commands, checkpoint: Path, until_the_child: None) -> None:
    run = lambda: commands.run("export", checkpoint, "-o", checkpoint.parent / "out")  # noqa: E731
    run_on_json(commands, checkpoint, CHECKPOINT_FILES, run)


def test_export_reads_any_safetensors_header(commands: Commands, checkpoint: Path, until_the_child: None) -> None:
    path = checkpoint / "model-00001-of-00001.safetensors"
    data, text = path.read_bytes(), header(path)
    rest = data[8 + len(text) :]

    def whole(changed_header: bytes) -> bytes:
        return len(changed_header).to_bytes(8, "little") + changed_header + rest

    headers = st.one_of(changed(json.loads(text)).map(lambda value: json.dumps(value).encode()), BYTES)

    @fuzz
    @hypothesis.given(st.one_of(headers.map(whole), broken(data, 8 + len(text))))
    def check(contents: bytes) -> None:
        if commands.over:
            return
        with replaced(path, contents):
            commands.run("export", checkpoint, "-o", checkpoint.parent / "out")

    check()


def test_export_into_any_existing_directory(
    commands: Commands, model: Path, tiny_checkpoint: Path, until_the_child: None
) -> None:
    run = lambda: commands.run("export", tiny_checkpoint, "-o", model)  # noqa: E731
    run_on_json(commands, model, MODEL_FILES, run)


def test_compress_reads_any_directory(commands: Commands, model: Path, until_the_child: None) -> None:
    run = lambda: commands.run("compress", model, "-o", model.parent / "out")  # noqa: E731
    run_on_json(commands, model, MODEL_FILES, run)


def test_any_adapter(
    commands: Commands, model: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import openvino_genai

    def no_engine(*_: object, **__: object) -> None:
        raise RuntimeError("the engine would load")

    monkeypatch.setattr(openvino_genai, "LLMPipeline", no_engine)
    folder = adapters.write(tiny_checkpoint, tmp_path / "adapter")
    weights = folder / "adapter_model.safetensors"
    data, text = weights.read_bytes(), header(weights)
    of_config = json_files(documents(folder, "adapter_config.json"))
    rest = data[8 + len(text) :]
    new_header = changed(json.loads(text)).map(lambda value: json.dumps(value).encode())
    of_weights = st.one_of(
        new_header.map(lambda each: len(each).to_bytes(8, "little") + each + rest), broken(data, 8 + len(text))
    )

    @fuzz
    @hypothesis.given(st.one_of(of_config, of_weights.map(lambda each: (weights.name, each))))
    def check(change: tuple[str, bytes]) -> None:
        if commands.over:
            return
        name, contents = change
        with replaced(folder / name, contents):
            commands.run("generate", model, "Hello", "--adapter", folder)

    check()


def gguf_value(value: Value) -> tuple[Value, Any] | None:
    """A value as GGUF can store it, and its type; None where it cannot."""
    from gguf import GGUFValueType as Type

    if isinstance(value, bool):
        return value, Type.BOOL
    if isinstance(value, int) and -(2**63) <= value < 2**63:
        return value, Type.INT64
    if isinstance(value, float):
        return value, Type.FLOAT64
    if isinstance(value, str) and "\ud800" not in value:
        return value, Type.STRING
    return None


def test_export_reads_any_gguf_metadata(commands: Commands, tmp_path: Path, until_the_child: None) -> None:
    import gguf
    import numpy as np

    path = tmp_path / "any.gguf"
    fields: dict[str, Value] = {
        "llama.context_length": 128,
        "llama.embedding_length": 32,
        "llama.block_count": 1,
        "llama.feed_forward_length": 32,
        "llama.attention.head_count": 2,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0,
        "llama.rope.dimension_count": 16,
        "llama.rope.scaling.type": "linear",
        "llama.rope.scaling.factor": 2.0,
        "general.license": "mit",
        "split.count": 1,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.chat_template": tiny.CHAT_TEMPLATE,
    }
    tokens = ["<s>", "</s>", *map(chr, range(33, 127)), "ab"]

    def write(values: Mapping[str, Value]) -> None:
        writer = gguf.GGUFWriter(path, "llama")
        for key, value in values.items():
            if stored := gguf_value(value):
                writer.add_key_value(key, *stored)
        writer.add_token_list(tokens)
        writer.add_token_types([3, 3, *[1] * (len(tokens) - 2)])
        writer.add_token_merges(["a b"])
        shapes = {"token_embd": (len(tokens), 32), "output_norm": (32,), "output": (len(tokens), 32)}
        shapes |= {f"blk.0.{name}": (32, 32) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
        shapes |= {f"blk.0.{name}": (32, 32) for name in ("ffn_gate", "ffn_up", "ffn_down")}
        shapes |= {"blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,)}
        for name, shape in shapes.items():
            writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    write(fields)
    original = path.read_bytes()

    @fuzz
    @hypothesis.given(st.one_of(changed(fields), broken(original, len(original) // 2)))
    def check(change: Mapping[str, Value] | bytes) -> None:
        if commands.over:
            return
        if isinstance(change, bytes):
            path.write_bytes(change)
        else:
            write(change)
        commands.run("export", path, "-o", tmp_path / "out")

    check()
