"""Packed or plain is chosen by what was measured on this machine, and by what a use spends its time on."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ov_afm.cli import info
from ov_afm.cli.kernels import main as kernels
from ov_afm.errors import ExtensionError
from ov_afm.kernels import extension, pack, select, speed
from ov_afm.model_dir.model_directory import ModelDirectory
from ov_afm.runtime import device_cache, kernel_choice, loading
from ov_afm.runtime.kernel_choice import CHAT, SERVE, Measured, Workload
from ov_afm.runtime.loading import LoadRequest, PhaseTimer

# The kernels decode faster, and read prompts slower.
MIXED = Measured(
    "a CPU", "avx2vnni", 4, 0.3, {1: 10, 4: 20, 16: 40, 256: 100}, {1: 5, 4: 19, 16: 60, 256: 300}, "today"
)


@pytest.fixture(scope="module")
def packed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, library: Path) -> ModelDirectory:
    """The tiny model with its packed form in it. Read-only."""
    path = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("packed") / "model"))
    pack.transform(path)
    return ModelDirectory.open(path)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OV_AFM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(select.DISABLE, raising=False)
    return tmp_path / "cache"


def files(model: ModelDirectory, **request: Any) -> tuple[Path, list[str]]:
    """The folder that is loaded, and the phases that choosing it took."""
    phases = PhaseTimer(model.key)
    choice = loading.devices.Choice("CPU", "")
    return loading._files(LoadRequest(model, **request), choice, {}, phases)[0], list(phases.elapsed_s)


def never(*_: Any, **__: Any) -> Any:
    pytest.fail("measured")


@pytest.mark.parametrize(
    ("workload", "packed_is_faster"),
    [
        (CHAT, True),  # 256 x 5 + 300 against 256 x 10 + 100 ms
        (Workload(prompt_tokens=8192, new_tokens=64), False),  # 64 x 5 + 32 x 300 against 64 x 10 + 32 x 100
        (Workload(new_tokens=256, together=(16,)), False),  # 16 x 60 + 300 against 16 x 40 + 100
        (Workload(prompt_tokens=1, new_tokens=256, together=(4,)), True),
    ],
)
def test_the_model_whose_steps_take_less_time_together_is_used(workload: Workload, packed_is_faster: bool) -> None:
    assert MIXED.packed_is_faster(workload) == packed_is_faster


def test_a_server_weighs_single_answers_and_batches_alike() -> None:
    # 256 / 3 tokens each alone, 4 and 16 at a time, and the prompt.
    assert SERVE.time_ms(MIXED.plain_ms) == pytest.approx(256 / 3 * (10 + 20 / 4 + 40 / 16) + 100)
    # Between 4 and 16 along a line, above 256 in proportion.
    eight, prompt = 20 + (40 - 20) / 3, 100 * 512 / 256
    assert Workload(512, 8, (8,)).time_ms(MIXED.plain_ms) == pytest.approx(eight + prompt)


@pytest.mark.parametrize("faster", ["packed", "plain"])
def test_a_load_uses_the_faster_model_and_measures_it_once_a_machine(
    packed: ModelDirectory, monkeypatch: pytest.MonkeyPatch, faster: str
) -> None:
    one, two = dict.fromkeys(speed.TOKENS, 1.0), dict.fromkeys(speed.TOKENS, 2.0)
    figures = (two, one) if faster == "packed" else (one, two)
    monkeypatch.setattr(speed, "measure", lambda *_: figures)
    expected = packed.packed if faster == "packed" else packed.path
    assert files(packed) == (expected, [loading.COMPARING])
    monkeypatch.setattr(speed, "measure", never)
    assert files(packed) == (expected, [])


def test_each_use_gets_its_own_model_from_the_same_figures(
    packed: ModelDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "measure", lambda *_: (MIXED.plain_ms, MIXED.packed_ms))
    assert files(packed)[0] == packed.packed
    assert files(packed, workload=Workload(together=(16,)))[0] == packed.path
    # Four tokens are drafted and verified at a time, with a fifth: more work in each step.
    assert (
        files(packed, workload=Workload(new_tokens=64), prompt_lookup=True, num_assistant_tokens=15)[0] == packed.path
    )


def test_the_environment_overrides_what_was_measured(packed: ModelDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "measure", never)
    for value, folder in (("0", packed.packed), ("1", packed.path)):
        monkeypatch.setenv(select.DISABLE, value)
        assert files(packed)[0] == folder


def test_what_the_figures_depend_on_is_measured_anew(packed: ModelDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "measure", lambda *_: (MIXED.plain_ms, MIXED.packed_ms))
    kernel_choice.measure(packed, {})
    assert kernel_choice.measured(packed, {"KV_CACHE_PRECISION": "u8"}) is not None
    assert kernel_choice.measured(packed, {"INFERENCE_NUM_THREADS": 1}) is None
    assert kernel_choice.measured(packed, {"INFERENCE_PRECISION_HINT": "f32"}) is None
    assert packed.manifest is not None
    sparsity = {**packed.manifest.sparsity, "kernels": {**packed.manifest.sparsity["kernels"], "activations": "int16"}}
    other = replace(packed, manifest=replace(packed.manifest, sparsity=sparsity))
    assert kernel_choice.measured(other, {}) is None
    assert kernel_choice.measured(replace(packed, geometry=replace(packed.geometry, hidden=128)), {}) is None
    monkeypatch.setattr(extension, "INTERFACE", extension.INTERFACE + 1)
    extension._load.cache_clear()
    with pytest.raises(ExtensionError, match="another version"):
        kernel_choice.measured(packed, {})


@pytest.mark.parametrize(
    "damage", [{"plain_ms": {}}, {"packed_ms": {"1": 0}}, {"plain_ms": {"1": "fast"}}, {"isa": None}]
)
def test_a_damaged_record_counts_as_none(packed: ModelDirectory, cache: Path, monkeypatch: Any, damage: Any) -> None:
    monkeypatch.setattr(speed, "measure", lambda *_: (MIXED.plain_ms, MIXED.packed_ms))
    kernel_choice.measure(packed, {})
    record = json.loads((cache / "devices.json").read_text())
    (key,) = record["kernels"]
    entry = {**record["kernels"][key], **damage}
    record["kernels"][key] = {name: value for name, value in entry.items() if value is not None}
    (cache / "devices.json").write_text(json.dumps(record))
    assert kernel_choice.measured(packed, {}) is None


def test_an_interrupted_measurement_keeps_nothing(packed: ModelDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    def interrupt(*_: Any) -> Any:
        taken.append(1)
        if len(taken) == 2:
            raise KeyboardInterrupt
        return 1.0, 2.0

    monkeypatch.setattr(speed, "_alternate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        files(packed)
    assert device_cache.read(kernel_choice.SECTION) == {}
    monkeypatch.undo()


def test_a_measurement_that_fails_stops_no_load(
    packed: ModelDirectory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("no memory")

    monkeypatch.setattr(speed, "measure", fail)
    assert files(packed)[0] == packed.packed
    assert "without a comparison with OpenVINO's own: no memory" in caplog.text


def test_the_commands_measure_for_real_and_show_it(
    packed: ModelDirectory, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert info.main([str(packed.path)]) == 0
    assert "on this machine: not compared yet; the next load does that" in capsys.readouterr().out
    assert kernels([str(packed.path), "--compare"]) == 0
    line = capsys.readouterr().out.strip()
    assert info.main([str(packed.path), "--json"]) == 0
    here = json.loads(capsys.readouterr().out)["kernels_here"]
    assert here["text"] == line
    assert set(here["uses"]) == {"chat", "serve"}
    for side in ("plain_ms", "packed_ms"):
        assert list(here["measured"][side]) == [str(tokens) for tokens in speed.TOKENS]
        assert min(here["measured"][side].values()) > 0
    found = kernel_choice.measured(packed, {})
    assert found is not None
    assert found.isa == extension.best_isa()
    assert kernels([str(tiny_model), "--compare"]) == 1
    assert f"{tiny_model} is not packed; run: ov-afm kernels {tiny_model}" in capsys.readouterr().err


@pytest.mark.parametrize("active", [0.1, 0.6])
def test_as_many_neurons_are_active_as_on_a_text(packed: ModelDirectory, monkeypatch: Any, active: float) -> None:
    import numpy as np

    from ov_afm.kernels import graph

    mlp = graph.read_mlps(packed.path, "")[1][0]
    up = graph.read_weights(mlp.up)
    x = np.random.default_rng(1).standard_normal((64, up.codes.shape[1]), np.float32)
    assert up.zeros is not None
    weights = (up.codes.astype(np.float32) - up.zeros) * up.scales.astype(np.float32)
    assert (x @ weights.T > speed._threshold(up, x, active)).mean() == pytest.approx(active, abs=0.01)
