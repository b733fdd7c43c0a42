"""Properties reach real plugins in the types they want; what cannot fit is refused with figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ov_afm.errors import ConfigError, DeviceError
from ov_afm.model_dir.geometry import Geometry
from ov_afm.runtime.properties import (
    MemoryEstimate,
    Use,
    build,
    check_free_memory,
    check_memory,
    estimate_memory,
)
from ov_afm.system import control_groups, resources

AFM = Geometry("ArceeForCausalLM", 2560, 36, 20, 4, 128, 18_432, 128_004, 65_536, "relu2")


def answer(model: Path, device: str, properties: dict[str, Any], *, batched: bool = False) -> list[int]:
    import openvino_genai

    if batched:
        scheduler = properties.pop("scheduler_config", openvino_genai.SchedulerConfig())
        batching = openvino_genai.ContinuousBatchingPipeline(model, scheduler, device, properties)
        config = openvino_genai.GenerationConfig(max_new_tokens=4, ignore_eos=True)
        ids = batching.get_tokenizer().encode("hello", add_special_tokens=False).input_ids
        return list(batching.generate([ids], [config])[0].m_generation_ids[0])
    engine = openvino_genai.LLMPipeline(model, device, **properties)
    inputs = engine.get_tokenizer().encode("hello", add_special_tokens=False)
    tokens: list[int] = engine.generate(inputs, max_new_tokens=4, do_sample=False, ignore_eos=True).tokens[0]
    return tokens


@pytest.mark.parametrize("batched", [False, True], ids=["alone", "batched"])
@pytest.mark.parametrize(
    "use",
    [
        Use(),
        Use(threads=1),
        Use(kv_cache="u8"),
        Use(kv_cache="f16"),
        Use(kv_cache="f32"),
        Use(exact=True),
        Use(prefix_caching=False),
    ],
    ids=["default", "threads", "u8", "f16", "f32", "exact", "no-prefix-caching"],
)
def test_cpu_plugin_takes_what_is_built(tiny_model: Path, use: Use, batched: bool) -> None:
    assert len(answer(tiny_model, "CPU", build("CPU", use), batched=batched)) == 4


def test_f32_cache_brings_the_inference_precision_that_it_needs() -> None:
    # A CPU with bf16 refuses the cache otherwise: "expect kvcache type bf16, current: f32 , f32".
    assert build("CPU", Use(kv_cache="f32"))["INFERENCE_PRECISION_HINT"] == "f32"
    assert build("CPU", user_properties={"KV_CACHE_PRECISION": "f32"})["INFERENCE_PRECISION_HINT"] == "f32"
    assert "INFERENCE_PRECISION_HINT" not in build("CPU", Use(kv_cache="f16"))
    assert "INFERENCE_PRECISION_HINT" not in build("GPU", Use(kv_cache="f32"))


@pytest.mark.parametrize("hint", ["bf16", "f16"])
def test_f32_cache_and_half_precision_exclude_each_other(hint: str) -> None:
    with pytest.raises(ConfigError, match="needs computing in f32") as error:
        build("CPU", Use(kv_cache="f32"), user_properties={"INFERENCE_PRECISION_HINT": hint})
    assert error.value.code == "kv-cache-precision"
    assert build("CPU", Use(kv_cache="f16"), user_properties={"INFERENCE_PRECISION_HINT": hint})


def test_properties_of_the_user_override_all_others() -> None:
    mine = {"INFERENCE_PRECISION_HINT": "bf16", "KV_CACHE_PRECISION": "u8"}
    assert build("CPU", Use(kv_cache="f32"), user_properties=mine) == mine


@pytest.mark.slow
@pytest.mark.parametrize(
    "use",
    [
        Use(prompt_tokens=256, new_tokens=64),
        Use(prompt_tokens=256, prefill_hint="STATIC", generate_hint="FAST_COMPILE"),
        Use(prompt_tokens=256, prefill_hint="DYNAMIC", chunk_tokens=64, prefix_caching=True),
    ],
    ids=["limits", "hints", "chunks"],
)
def test_emulated_npu_takes_what_is_built(tiny_model: Path, use: Use) -> None:
    assert len(answer(tiny_model, "NPU", build("NPU", use, emulated=True))) == 4


@pytest.mark.slow
def test_compiled_model_is_cached_in_the_folder_given(tiny_model: Path, tmp_path: Path) -> None:
    properties = build("NPU", Use(prompt_tokens=256), emulated=True, cache_dir=tmp_path)
    first = answer(tiny_model, "NPU", properties)
    (blob,) = tmp_path.glob("*.blob")
    written = blob.stat().st_mtime_ns
    assert answer(tiny_model, "NPU", properties) == first
    assert [path.stat().st_mtime_ns for path in tmp_path.glob("*.blob")] == [written]


def test_blob_is_exported_once_and_read_afterwards(tmp_path: Path) -> None:
    blob = tmp_path / "model.blob"
    assert build("NPU", Use(blob=blob))["EXPORT_BLOB"] is True
    blob.touch()
    found = build("NPU", Use(blob=blob), cache_dir=tmp_path)
    assert found["BLOB_PATH"] == str(blob)
    assert "EXPORT_BLOB" not in found
    assert "CACHE_DIR" not in found


def test_cpu_gets_no_compiled_model_cache(tmp_path: Path) -> None:
    assert build("CPU", cache_dir=tmp_path) == {}


def test_npu_limits_are_always_set_as_ints() -> None:
    found = build("NPU")
    assert (found["MAX_PROMPT_LEN"], found["MIN_RESPONSE_LEN"]) == (1024, 128)
    assert type(found["MAX_PROMPT_LEN"]) is int


def test_gpu_allows_large_allocations_only_where_one_is_needed() -> None:
    assert "GPU_ENABLE_LARGE_ALLOCATIONS" not in build("GPU", largest_bytes=3, max_alloc_bytes=4)
    assert build("GPU", largest_bytes=5, max_alloc_bytes=4)["GPU_ENABLE_LARGE_ALLOCATIONS"] is True


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"chunk_tokens": 60}, "chunk_tokens must be a power of two, found 60"),
        ({"prompt_tokens": 0}, "prompt_tokens must be at least 1, found 0"),
        ({"kv_cache": "u4"}, "kv_cache must be one of u8, f16, f32, found 'u4'"),
        ({"generate_hint": "FAST"}, "generate_hint must be one of FAST_COMPILE, BEST_PERF, found 'FAST'"),
        ({"blob": Path("model.bin")}, r"must end in \.blob, found model\.bin"),
    ],
)
def test_values_that_no_plugin_takes_are_refused(fields: dict[str, Any], found: str) -> None:
    with pytest.raises(ConfigError, match=found):
        Use(**fields)


@pytest.mark.parametrize(
    ("device", "use", "named"),
    [
        ("CPU", Use(generate_hint="BEST_PERF", chunk_tokens=64), "CPU does not take generate_hint, chunk_tokens"),
        ("GPU.1", Use(threads=2), "GPU.1 does not take threads"),
        ("GPU", Use(lock_memory=True), "GPU does not take lock_memory"),
        ("NPU", Use(kv_cache="u8"), "NPU does not take kv_cache"),
    ],
)
def test_what_another_device_takes_is_refused_by_name(device: str, use: Use, named: str) -> None:
    with pytest.raises(ConfigError, match=f"^{named}$"):
        build(device, use)


def test_cache_of_a_full_context_is_counted() -> None:
    need = estimate_memory(2_700_000_000, AFM, "NPU", Use(prompt_tokens=4000, new_tokens=96))
    # 36 layers x 4 heads x 128 x (key and value) x 2 bytes = 73,728 bytes a token
    assert need.kv_bytes == 73_728 * 4096
    assert need.total_bytes == 2_700_000_000 + need.kv_bytes
    assert estimate_memory(0, AFM, "CPU", Use(prompt_tokens=4096)).kv_bytes < need.kv_bytes


def test_model_that_does_not_fit_is_refused_with_both_figures() -> None:
    need = estimate_memory(9_240_000_000, AFM, "GPU", Use(kv_cache="f16"))
    with pytest.raises(
        DeviceError, match=r"^GPU has 8\.00 GB; the model needs 9\.24 GB and 0\.30 GB more .* 4096 tokens"
    ):
        check_memory(need, "GPU", 8_000_000_000)
    check_memory(need, "GPU", 10_000_000_000)
    check_memory(need, "GPU", None)


@pytest.mark.parametrize(("packed", "fits"), [(True, True), (False, False)], ids=["packed", "plain"])
def test_what_the_plugin_repacks_counts_and_what_the_kernels_map_does_not(
    monkeypatch: pytest.MonkeyPatch, packed: bool, fits: bool
) -> None:
    monkeypatch.setattr(resources, "free_memory", lambda: 3_500_000_000)
    need = MemoryEstimate(2_700_000_000, 300_000_000, 4096)
    if fits:
        check_free_memory(need, "afm on CPU", packed=packed)
        return
    with pytest.raises(DeviceError) as caught:
        check_free_memory(need, "afm on CPU", packed=packed)
    assert caught.value.code == "memory-short"
    assert str(caught.value).startswith(
        "afm on CPU (2.70 GB of weights, 4096 tokens of context) needs about 4.11 GB of memory, 3.50 GB are free"
    )


def test_threads_follow_a_cpu_quota_and_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "INFERENCE_NUM_THREADS" not in build("CPU")
    monkeypatch.setattr(control_groups, "quota_threads", lambda: 3)
    assert build("CPU")["INFERENCE_NUM_THREADS"] == 3
    assert build("CPU", Use(threads=5))["INFERENCE_NUM_THREADS"] == 5
    assert "INFERENCE_NUM_THREADS" not in build("GPU")
