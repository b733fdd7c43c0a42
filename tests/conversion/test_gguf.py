"""GGUF files become checkpoints: same weights, same logits, same token ids."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from support import tiny

from ov_afm.conversion import convert, generation_config, sources
from ov_afm.conversion.gguf import weights as ours
from ov_afm.conversion.gguf.tokenizer import PRE_TOKENIZERS, write_tokenizer
from ov_afm.errors import SourceError
from ov_afm.model_dir import manifest
from ov_afm.runtime.chat_template import ChatTemplate

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate_proj": "ffn_gate",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}

Writer = Any


def write_gguf(
    checkpoint: Path,
    path: Path,
    quantization: str = "F32",
    change: Callable[[Writer], None] | None = None,
    tokenizer: Callable[[Writer], None] | None = None,
) -> Path:
    """What llama.cpp's converter makes of a llama or arcee checkpoint (conversion/llama.py and arcee.py there)."""
    import gguf
    from safetensors.torch import load_file

    config = json.loads((checkpoint / "config.json").read_text())
    arch, rope = config["model_type"], config["rope_parameters"]
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_license("apache-2.0")
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if tokenizer:
        tokenizer(writer)
    else:
        add_tokenizer(writer, checkpoint)
    for name, tensor in load_file(checkpoint / "model.safetensors").items():
        data = tensor.float().numpy()
        stem = name.removesuffix(".weight")
        if stem in OUTER:
            new = f"{OUTER[stem]}.weight"
        else:
            _, _, layer, part = stem.split(".", 3)
            new = f"blk.{layer}.{NAMES[part]}.weight"
            if part in ("self_attn.q_proj", "self_attn.k_proj"):
                heads = config["num_attention_heads" if "q_proj" in part else "num_key_value_heads"]
                data = data.reshape(heads, 2, len(data) // heads // 2, -1).swapaxes(1, 2).reshape(data.shape)
        kind = gguf.GGMLQuantizationType[quantization if data.ndim > 1 else "F32"]
        writer.add_tensor(new, gguf.quants.quantize(np.ascontiguousarray(data), kind), raw_dtype=kind)
    if change:
        change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tokenizer(writer: Writer, checkpoint: Path) -> None:
    fields = json.loads((checkpoint / "tokenizer.json").read_text())
    vocabulary = fields["model"]["vocab"]
    special = {token["content"] for token in fields["added_tokens"]}
    tokens = sorted(vocabulary, key=vocabulary.get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in fields["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(tiny.CHAT_TEMPLATE)


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Conversions of this module go to a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OV_AFM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def logits(folder: Path, ids: list[int]) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


PROMPT = [(7 * i) % 500 + 3 for i in range(300)]  # beyond the tiny model's 128 positions before YaRN


def test_arcee_gguf_gives_the_logits_of_its_source(tiny_checkpoint: Path, tmp_path: Path) -> None:
    source = sources.resolve(write_gguf(tiny_checkpoint, tmp_path / "tiny.gguf"))
    assert (source.kind, source.id, source.license) == ("gguf", "tiny.gguf", "apache-2.0")
    assert [path.name for path in source.weights] == ["tiny.gguf"]
    assert logits(source.path, PROMPT).equal(logits(tiny_checkpoint, PROMPT))


def test_quantized_arcee_gguf_stays_within_its_steps(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file
    from safetensors.torch import load_file as load_torch

    source = sources.resolve(write_gguf(tiny_checkpoint, tmp_path / "tiny.gguf", "Q8_0"))
    found = load_file(source.path / "model.safetensors")
    for name, tensor in load_torch(tiny_checkpoint / "model.safetensors").items():
        blocks = tensor.float().numpy().reshape(-1, 32)
        # Half a step, and what storing the step as float16 adds.
        bound = np.abs(blocks).max(axis=1, keepdims=True) / 127 * (0.5 + 127 * 2**-11) + 1e-6
        assert (np.abs(found[name].reshape(-1, 32) - blocks) <= bound).all(), name
    assert distance(source.path, tiny_checkpoint) < 0.1


def distance(folder: Path, reference: Path) -> float:
    """Root mean square of the logits' difference, relative to the logits."""
    wanted = logits(reference, PROMPT)
    return float((logits(folder, PROMPT) - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(("stored", "dtype"), [("BF16", "bfloat16"), ("F16", "float16"), ("Q8_0", "float16")])
def test_large_model_takes_half_the_space(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: str, dtype: str
) -> None:
    monkeypatch.setattr(ours, "EXACT_UP_TO", 1000)
    monkeypatch.setattr(ours, "CHUNK", 1000)
    path = write_gguf(tiny_checkpoint, tmp_path / "tiny.gguf", stored)
    ours.convert(path, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == dtype
    # The source is bfloat16 of moderate size: float16 holds it but for subnormals, bfloat16 exactly.
    assert distance(tmp_path, tiny_checkpoint) <= {"BF16": 0.0, "F16": 1e-4, "Q8_0": 0.1}[stored]


def test_tokenizer_and_template_are_those_of_the_source(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    source = sources.resolve(write_gguf(tiny_checkpoint, tmp_path / "tiny.gguf"))
    wanted, found = AutoTokenizer.from_pretrained(tiny_checkpoint), AutoTokenizer.from_pretrained(source.path)
    for text in tiny.TEXTS:
        assert found(text).input_ids == wanted(text).input_ids
        assert found.decode(found(text).input_ids) == text
    assert found.chat_template == tiny.CHAT_TEMPLATE
    assert (found.bos_token_id, found.eos_token_id, found.pad_token_id) == (0, 2, 2)
    assert found.all_special_ids == wanted.all_special_ids
    assert json.loads((source.path / "generation_config.json").read_text())["eos_token_id"] == 2


@pytest.mark.parametrize("kind", [3, 4], ids=["control", "user-defined"])
def test_the_end_of_a_turn_is_found_without_an_eot_token_id(tiny_checkpoint: Path, tmp_path: Path, kind: int) -> None:
    """Only the chat template says that `<|im_end|>` ends a turn."""

    def change(writer: Writer) -> None:
        writer.kv_data[0]["tokenizer.ggml.eos_token_id"].value = 0
        writer.kv_data[0]["tokenizer.ggml.token_type"].value[2] = kind

    source = sources.resolve(write_gguf(tiny_checkpoint, tmp_path / "tiny.gguf", change=change))
    output = tmp_path / "model"
    output.mkdir()
    convert.write_tokenizer(source.path, output)
    generation = generation_config.carry(source.path, output)
    assert [token["id"] for token in generation["stop_tokens"]] == [0, 2]
    assert generation["added"]["eos_token_id"] == [2]
    assert json.loads((output / "generation_config.json").read_text())["eos_token_id"] == [0, 2]


def test_templates_for_one_purpose_are_carried(tiny_checkpoint: Path, tmp_path: Path) -> None:
    def change(writer: Writer) -> None:
        writer.add_array("tokenizer.chat_templates", ["tool_use"])
        writer.add_string("tokenizer.chat_template.tool_use", "tools: {{ tools | length }}")

    source = sources.resolve(write_gguf(tiny_checkpoint, tmp_path / "tiny.gguf", change=change))
    template = ChatTemplate.read(source.path)
    assert template is not None
    assert template.text == tiny.CHAT_TEMPLATE
    assert template.render([{"role": "user", "content": "a"}], tools=[{}, {}]) == "tools: 2"


def test_conversion_is_kept_until_the_file_changes(tiny_checkpoint: Path, tmp_path: Path) -> None:
    path = write_gguf(tiny_checkpoint, tmp_path / "tiny.gguf")
    first = sources.resolve(path).path
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    assert (sources.resolve(path).path / "model.safetensors").stat().st_mtime_ns == stamp
    times = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    changed = sources.resolve(path)
    assert changed.path != first
    assert changed.describe()["weights"] == {"tiny.gguf": manifest.sha256(path)}


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", "It's 12345 ok,  x\n\ny", "It 's Ġ12345 Ġok , Ġ Ġx Ċ Ċ y"),
        ("smollm", "It's 12345 ok,  x\n\ny", "It 's Ġ 1 2 3 4 5 Ġok , Ġ Ġx Ċ Ċ y"),
        ("qwen2", "It'S 12345 ok,  x\n\ny", "It 'S Ġ 1 2 3 4 5 Ġok , Ġ Ġx ĊĊ y"),
        ("llama-bpe", "It'S 12345 ok,  x\n\ny", "It 'S Ġ 123 45 Ġok , Ġ Ġx ĊĊ y"),
        ("llama-bpe", "(foo) bar.\n\n!?", "(foo ) Ġbar .ĊĊ !?"),
        ("default", "a 12345 $x=1", "a Ġ 123 45 Ġ $ x = 1"),
    ],
)
def test_text_is_cut_as_llama_cpp_cuts_it(
    tiny_checkpoint: Path, tmp_path: Path, pre: str, text: str, pieces: str
) -> None:
    from tokenizers import Tokenizer

    path = write_gguf(tiny_checkpoint, tmp_path / "tiny.gguf", change=override("tokenizer.ggml.pre", pre))
    tokenizer = Tokenizer.from_file(str(sources.resolve(path).path / "tokenizer.json"))
    assert [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)] == pieces.split(" ")
    # Llama 3 starts every text with BOS; the others do not unless the file says so.
    assert (tokenizer.encode(text).ids[0] == 0) == (pre == "llama-bpe")
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=True) == text


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
# As in src/llama-vocab.cpp of ggml-org/llama.cpp, where each rule cuts what the one before left.
SEQUENCES = {
    "gpt-2": [GPT2],
    "smollm": [r"\p{N}", GPT2],
    "default": [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"],
}


@pytest.mark.parametrize("pre", SEQUENCES)
@hypothesis.settings(max_examples=500, deadline=None, database=None)
@hypothesis.given(
    text=st.text(st.sampled_from("  \t\n\r\u00a0\u3000aZé你'sdlm0123½Ⅷ²+$<^~|`.,-_(¢🙂\u0301"), max_size=24)
)
def test_one_expression_cuts_as_llama_cpps_sequence_does(pre: str, text: str) -> None:
    from tokenizers import Regex, pre_tokenizers

    sequence = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(rule), "isolated") for rule in SEQUENCES[pre]])
    single = pre_tokenizers.Split(Regex(PRE_TOKENIZERS[pre]), "isolated")
    assert single.pre_tokenize_str(text) == sequence.pre_tokenize_str(text)


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "qwen2", "llama-bpe", "default"])
def test_openvino_tokenizes_as_the_converted_tokenizer_does(tiny_checkpoint: Path, tmp_path: Path, pre: str) -> None:
    import openvino
    from openvino_tokenizers import convert_tokenizer
    from transformers import AutoTokenizer

    path = write_gguf(tiny_checkpoint, tmp_path / "tiny.gguf", change=override("tokenizer.ggml.pre", pre))
    tokenizer = AutoTokenizer.from_pretrained(sources.resolve(path).path)
    compiled = openvino.compile_model(convert_tokenizer(tokenizer), "CPU")
    for text in tiny.TEXTS:
        assert compiled([text])["input_ids"][0].tolist() == tokenizer(text).input_ids, text


def test_large_vocabulary_is_read_in_seconds(tmp_path: Path) -> None:
    letters = [chr(0x100 + index) for index in range(200)]
    pairs = [(first, second) for first in letters for second in letters]
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": letters + ["".join(pair) for pair in pairs],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in pairs],
    }
    start = time.monotonic()
    write_tokenizer(tmp_path, fields, "large.gguf", 1024)
    assert time.monotonic() - start < 10


def llama(path: Path, **rope: Any) -> Path:
    """A random llama checkpoint with the tiny tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    changes = {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default", **rope}, "hidden_act": "silu"}
    model = LlamaForCausalLM(LlamaConfig(**{**tiny.ARCEE, **changes}))
    model.save_pretrained(path)
    tiny.write_tokenizer(path)
    return path


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def llama3_factors(factor: float, head_dim: int = 16) -> Any:
    """What the converter of llama.cpp writes as `rope_freqs.weight` (`generate_extra_tensors`, conversion/llama.py)."""
    factors = []
    for index in range(0, head_dim, 2):
        wavelength = 2 * np.pi * 500000.0 ** (index / head_dim)
        smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
        factors.append(1 / ((1 - smooth) / factor + smooth) if 0 <= smooth <= 1 else 1 if smooth > 1 else factor)
    return np.array(factors, np.float32)


# A factor with many digits, and one that float32 does not hold exactly.
@pytest.mark.parametrize("factor", [8.0, 32.0, 1.3, 12.3456])
# Roundings of float32 that a CPU may make more or fewer of while a file is written.
@pytest.mark.parametrize("roundings", [-4, -1, 0, 1, 4])
def test_llama3_rope_comes_back_from_its_factors(tmp_path: Path, factor: float, roundings: int) -> None:
    checkpoint = llama(tmp_path / "llama", **{**LLAMA3, "factor": factor}, rope_theta=500000.0)
    factors = llama3_factors(factor)
    noisy = factors + roundings * np.spacing(factors)
    path = write_gguf(checkpoint, tmp_path / "llama.gguf", change=lambda w: w.add_tensor("rope_freqs.weight", noisy))
    rope = sources.resolve(path).config["rope_parameters"]
    assert rope == {**LLAMA3, "factor": factor, "rope_theta": 500000.0}


def test_llama3_gguf_gives_the_logits_of_its_source(tmp_path: Path) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaConfig

    checkpoint = llama(tmp_path / "llama", **LLAMA3, rope_theta=500000.0)
    config = LlamaConfig.from_pretrained(checkpoint)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    # Factors from the frequencies that transformers computes, with the roundings of this CPU.
    plain = 500000.0 ** -(np.arange(0, 16, 2, dtype=np.float32) / 16)
    factors = (plain / scaled.numpy()).astype(np.float32)
    assert factors == pytest.approx(llama3_factors(32.0), rel=1e-5)
    path = write_gguf(checkpoint, tmp_path / "llama.gguf", change=lambda w: w.add_tensor("rope_freqs.weight", factors))
    source = sources.resolve(path)
    assert source.config["rope_parameters"] == {**LLAMA3, "rope_theta": 500000.0}
    assert logits(source.path, PROMPT).equal(logits(checkpoint, PROMPT))


@pytest.mark.parametrize(
    "change", [lambda factors: factors + 0.5, lambda factors: factors[:-1]], ids=["value", "shape"]
)
def test_other_rope_factors_are_refused(tmp_path: Path, change: Callable[[Any], Any]) -> None:
    checkpoint = llama(tmp_path / "llama", **LLAMA3, rope_theta=500000.0)
    factors = change(llama3_factors(32.0))
    odd = write_gguf(checkpoint, tmp_path / "odd.gguf", change=lambda w: w.add_tensor("rope_freqs.weight", factors))
    with pytest.raises(SourceError, match="the rope frequencies of odd.gguf are not those of Llama 3") as caught:
        sources.resolve(odd)
    assert caught.value.code == "gguf-rope-unsupported"


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def truncated_in_metadata(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:2000])


def other_magic(path: Path) -> None:
    path.write_bytes(b"PK\x03\x04" + path.read_bytes()[4:])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncated, r"tiny.gguf is cut short or damaged \(\d+ bytes\); fetch it again$"),
        (truncated_in_metadata, r"tiny.gguf is cut short or damaged \(2000 bytes\); fetch it again$"),
        (other_magic, r"tiny.gguf is no GGUF file: it starts with b'PK\\x03\\x04'; fetch it again$"),
        (empty, r"tiny.gguf is no GGUF file: it starts with b''; fetch it again$"),
    ],
)
def test_damaged_file_is_refused_in_one_line(
    tiny_checkpoint: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    path = write_gguf(tiny_checkpoint, tmp_path / "tiny.gguf")
    damage(path)
    with pytest.raises(SourceError, match=message) as raised:
        sources.resolve(path)
    assert "\n" not in str(raised.value)


def override(key: str, value: Any) -> Callable[[Writer], None]:
    def change(writer: Writer) -> None:
        entry = writer.kv_data[0].get(key)
        if entry is not None and type(entry.value) is type(value):
            entry.value = value
            return
        if entry is not None:
            del writer.kv_data[0][key]
        adds = {str: writer.add_string, float: writer.add_float32, bool: writer.add_bool, list: writer.add_array}
        adds.get(type(value), writer.add_uint32)(key, value)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            override("general.architecture", "gemma3"),
            r"^GGUF architecture 'gemma3' of tiny.gguf is not supported; supported are llama, arcee$",
        ),
        (
            override("tokenizer.ggml.model", "t5"),
            r"^tokenizer 't5' of tiny.gguf is not supported \('gpt2', byte-level BPE, and 'llama', Sent",
        ),
        (
            override("tokenizer.ggml.pre", "tekken"),
            r"^pre-tokenizer 'tekken' of tiny.gguf is not supported; known are .*smollm",
        ),
        (
            lambda writer: writer.kv_data[0].pop("tokenizer.ggml.pre"),
            r"^tiny.gguf does not say how its tokenizer cuts text .*: gguf-new-metadata --pre-tokenizer RULE tiny",
        ),
        (
            override("split.count", 3),
            r"^tiny.gguf says that it is part 1 of 3, and its name says another; give the parts",
        ),
        (
            override("arcee.attention.causal", 0),
            r"^tiny.gguf has arcee.attention.causal 0, which has no place in arcee; use",
        ),
        (
            override("arcee.logit_scale", 2),
            r"^tiny.gguf has arcee.logit_scale 2, which has no place in arcee; use the safe",
        ),
        (
            override("arcee.attention.value_length", 8),
            r"^tiny.gguf has arcee.attention.value_length 8, which has no place",
        ),
        (
            override("arcee.block_count", [1, 1]),
            r"^arcee.block_count of tiny.gguf is \[1, 1\], where one positive number",
        ),
        (
            lambda writer: writer.add_tensor("rope_freqs.weight", np.ones(8, np.float32)),
            r"^rope scaling of tiny.gguf is not supported \(rope_freqs.weight and type yarn, orig",
        ),
        (
            override("arcee.rope.scaling.type", "longrope"),
            r"^rope scaling of tiny.gguf is not supported \(type longrope\); use the safetensors model$",
        ),
        (
            lambda writer: writer.add_tensor("blk.0.ffn_gate.weight", np.zeros((4, 4), np.float32)),
            r"^tiny.gguf has tensor blk.0.ffn_gate.weight, which has no place in arcee; use the safetensors model$",
        ),
        (
            override("arcee.block_count", 3),
            r"^tiny.gguf lacks tensor blk.2.attn_norm.weight; use the safe",
        ),
        (
            override("tokenizer.ggml.merges", ["no such"]),
            r"^tokenizer data of tiny.gguf contradict each other \(a merge needs .*\); use the safetensors model$",
        ),
    ],
    ids=[
        "architecture",
        "tokenizer",
        "pre-tokenizer",
        "no-pre-tokenizer",
        "split",
        "not-causal",
        "logit-scale",
        "value-length",
        "value-by-layer",
        "two-ropes",
        "rope",
        "tensor-unknown",
        "tensor-missing",
        "merges",
    ],
)
def test_what_is_not_supported_is_named(
    tiny_checkpoint: Path, tmp_path: Path, change: Callable[[Writer], None], message: str
) -> None:
    path = write_gguf(tiny_checkpoint, tmp_path / "tiny.gguf", change=change)
    with pytest.raises(SourceError, match=message):
        sources.resolve(path)


@pytest.mark.parametrize(
    "keys", [{"arcee.rope.scaling.factor": 4.0}, {"arcee.rope.scale_linear": 4.0}], ids=["new", "old"]
)
def test_factor_without_a_type_is_linear_as_in_llama_cpp(
    tiny_checkpoint: Path, tmp_path: Path, keys: dict[str, float]
) -> None:
    def change(writer: Writer) -> None:
        for key in [key for key in writer.kv_data[0] if ".rope.scaling." in key]:
            del writer.kv_data[0][key]
        for key, value in keys.items():
            override(key, value)(writer)

    path = write_gguf(tiny_checkpoint, tmp_path / "tiny.gguf", change=change)
    assert sources.resolve(path).config["rope_parameters"] == {
        "rope_type": "linear",
        "factor": 4.0,
        "rope_theta": 10000.0,
    }


def split(path: Path, count: int) -> list[Path]:
    """What `llama-gguf-split` makes of a file: the metadata is in the first part, tensors are in all."""
    import gguf

    reader = gguf.GGUFReader(path)
    parts = []
    for number in range(count):
        part = path.with_name(f"{path.stem}-{number + 1:05d}-of-{count:05d}{path.suffix}")
        writer = gguf.GGUFWriter(part, reader.fields["general.architecture"].contents())
        for key, field in reader.fields.items():
            if number or key.startswith("GGUF.") or key == "general.architecture":
                continue
            kind = field.types[0]
            inner = field.types[1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), kind, sub_type=inner)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in reader.tensors[number::count]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        parts.append(part)
    path.unlink()
    return parts


def test_split_file_is_one_model_whichever_part_is_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    parts = split(write_gguf(tiny_checkpoint, tmp_path / "tiny.GGUF"), 3)
    source = sources.resolve(parts[1])
    assert (source.kind, source.id, source.weights) == ("gguf", "tiny.GGUF", tuple(parts))
    assert logits(source.path, PROMPT).equal(logits(tiny_checkpoint, PROMPT))
    assert sources.resolve(parts[0]).path == source.path
    assert set(source.describe()["weights"]) == {path.name for path in parts}


def test_parts_that_do_not_belong_together_are_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    parts = split(write_gguf(tiny_checkpoint, tmp_path / "tiny.gguf"), 3)
    second = parts[1].read_bytes()
    parts[1].write_bytes(parts[2].read_bytes())
    with pytest.raises(
        SourceError, match="tiny-00002-of-00003.gguf says that it is part 3 of 3, and its name says another"
    ):
        sources.resolve(parts[0])
    parts[1].unlink()
    with pytest.raises(
        SourceError, match=r"tiny-00002-of-00003.gguf is missing beside tiny-00003-of-00003.gguf \(1 of 3"
    ):
        sources.resolve(parts[2])
    parts[1].write_bytes(second)
    parts[0].rename(tmp_path / "alone.gguf")
    with pytest.raises(SourceError, match="alone.gguf says that it is part 1 of 3, and its name says another"):
        sources.resolve(tmp_path / "alone.gguf")


def test_full_disk_is_foreseen(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    path = write_gguf(tiny_checkpoint, tmp_path / "tiny.gguf")
    # What the other tests converted is found by its content.
    monkeypatch.setenv("OV_AFM_CACHE", str(tmp_path / "cache"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda where: usage._replace(free=1000))
    with pytest.raises(SourceError, match=r"^converting tiny.gguf needs \d+\.\d kB in .*, 1.0 kB are free; free some"):
        sources.resolve(path)
