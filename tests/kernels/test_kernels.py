"""The native kernels against the numpy reference, for every instruction set that this CPU has.

Those with VNNI also run over emulated instructions, by the stand-alone C++ test and its own reference.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.weights import random_weights

from ov_afm.errors import ExtensionError
from ov_afm.kernels import extension, layout
from ov_afm.kernels.layout import CHANNEL_WISE, Quantized

# The portable variants of other widths are for the C++ test, which runs them.
ISAS = ("portable", "avx2", "avx2vnni", "avx512vnni", "amx")
pytestmark = pytest.mark.native


def _built() -> str | None:
    try:
        extension.best_isa()
    except ExtensionError as error:
        return str(error)
    return None


@pytest.fixture(scope="module", autouse=True)
def library() -> None:
    if reason := _built():
        try:
            extension.build()
        except ExtensionError as error:
            pytest.skip(f"{reason}; {error}")


def dequantized(weights: Quantized) -> npt.NDArray[np.float64]:
    """Weights (outputs, inputs)."""
    span = weights.codes.shape[1] if weights.group == CHANNEL_WISE else weights.group
    zeros = weights.symmetric_zero if weights.zeros is None else np.repeat(weights.zeros.astype(np.float32), span, 1)
    scales = np.repeat(weights.scales.astype(np.float32), span, 1)
    return ((weights.codes.astype(np.float32) - zeros) * scales).astype(np.float32).astype(np.float64)


def ffn(x: npt.NDArray[np.float32], up: Quantized, down: Quantized, threshold: float = 0.0) -> npt.NDArray[np.float32]:
    """The MLP (tokens, hidden) → (tokens, hidden), at float64 inside: what the kernels approximate."""
    z = x.astype(np.float64) @ dequantized(up).T
    h = np.where(z <= threshold, 0.0, z) ** 2  # a NaN is not below: it stays
    return np.asarray(h @ dequantized(down).T, np.float32)


def build_model(up: Quantized, down: Quantized, **attributes: Any) -> Any:
    import openvino as ov
    from openvino import opset13 as op
    from openvino.utils.node_factory import NodeFactory

    factory = NodeFactory()
    factory.add_extension(str(extension.load()))
    x = op.parameter(ov.PartialShape([-1, -1, up.codes.shape[1]]), np.float32)
    constants = [ov.op.Constant(packed).output(0) for packed in (layout.pack_up(up), layout.pack_down(down))]
    fields = {
        "hidden": up.codes.shape[1],
        "neurons": up.codes.shape[0],
        "up_bits": up.bits,
        "up_group": up.group,
        "up_asymmetric": up.zeros is not None,
        "down_bits": down.bits,
        "down_group": down.group,
        "down_asymmetric": down.zeros is not None,
    }
    node = factory.create("ReLU2FFN", [x.output(0), *constants], {**fields, **attributes})
    core = ov.Core()
    core.add_extension(str(extension.library()))
    config = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": attributes.get("threads", 2)}
    return core.compile_model(ov.Model([node], [x]), "CPU", config)


def run(model: Any, x: np.ndarray) -> np.ndarray:
    # Not model(x): that shares the array, and OpenVINO's next request may write into it.
    return np.array(model.create_infer_request().infer([x[None]])[0][0])


def assert_close(y: np.ndarray, expected: np.ndarray, bits: int) -> None:
    """Relative error of the whole output: what int8 or int16 activations cost on random weights."""
    error = np.sqrt(((y - expected) ** 2).mean() / max((expected**2).mean(), 1e-20))
    assert error < {8: 0.03, 16: 2e-4}[bits], error


def isas() -> list[Any]:
    if _built():
        return [pytest.param("portable")]
    return [pytest.param(isa, marks=[] if extension.has_isa(isa) else pytest.mark.skip("not this CPU")) for isa in ISAS]


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize(
    "up_weights, down_weights",
    [((4, 32, False), (4, 64, False)), ((4, 128, True), (8, CHANNEL_WISE, True)), ((8, -1, False), (4, 128, False))],
    ids=["int4-sym", "int4-asym-int8-asym", "int8-sym-int4-sym"],
)
@pytest.mark.parametrize("tokens", [1, 2, 7, 70])
def test_every_variant_agrees_with_numpy(isa: str, bits: int, up_weights: Any, down_weights: Any, tokens: int) -> None:
    rng = np.random.default_rng(tokens)
    up, down = random_weights(rng, 384, 256, *up_weights), random_weights(rng, 256, 384, *down_weights)
    model = build_model(up, down, isa=isa, activation_bits=bits)
    x = rng.standard_normal((tokens, 256)).astype(np.float32)
    assert_close(run(model, x), ffn(x, up, down), bits)


def compiled(target: str, folder: Path) -> Path:
    """One of CMake's test programs."""
    csrc = Path(__file__).parents[2] / "csrc"
    options = [f"-DPython_EXECUTABLE={sys.executable}", "-DOV_AFM_REQUIRE_KERNELS=ON", "-DOV_AFM_BUILD_TESTS=ON"]
    for command in (["-S", csrc, "-B", folder, *options], ["--build", folder, "--target", target]):
        done = subprocess.run(["cmake", *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, done.stdout[-4000:]
    return folder / target


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="the emulated instructions are compiled by GCC and Clang only")
@pytest.mark.skipif(shutil.which("cmake") is None, reason="no CMake")
def test_vnni_and_amx_variants_agree_with_the_reference_by_emulation(tmp_path: Path) -> None:
    if not extension.has_isa("avx2"):
        pytest.skip("the emulation needs AVX2")
    done = subprocess.run([compiled("test_kernels_emulated", tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ran = ("portable", "portable8", "portable16", "avx2vnni", "avx512vnni", "amx")
    cases = {isa: len(re.findall(rf"^{isa} .*relative error", done.stdout, re.MULTILINE)) for isa in ran}
    assert len(set(cases.values())) == 1
    assert cases["amx"] > 0
    assert "EMULATED" in done.stdout


def test_outputs_beyond_one_tile_of_sums_agree_with_numpy() -> None:
    rng = np.random.default_rng(0)
    up, down = random_weights(rng, 128, 9000, group=CHANNEL_WISE), random_weights(rng, 9000, 128)
    x = rng.standard_normal((1, 9000)).astype(np.float32)
    model = build_model(up, down, activation_bits=16)
    assert_close(run(model, x), ffn(x, up, down), 16)


def build_linear(matrices: list[Quantized], **attributes: Any) -> Any:
    import openvino as ov
    from openvino import opset13 as op
    from openvino.utils.node_factory import NodeFactory

    factory = NodeFactory()
    factory.add_extension(str(extension.load()))
    first = matrices[0]
    x = op.parameter(ov.PartialShape([-1, -1, first.codes.shape[1]]), np.float32)
    constants = [ov.op.Constant(layout.pack_up(matrix)).output(0) for matrix in matrices]
    fields = {
        "inputs": first.codes.shape[1],
        "outputs": [matrix.codes.shape[0] for matrix in matrices],
        "bits": first.bits,
        "group": first.group,
        "asymmetric": first.zeros is not None,
    }
    node = factory.create("PackedLinear", [x.output(0), *constants], {**fields, **attributes})
    core = ov.Core()
    core.add_extension(str(extension.library()))
    return core.compile_model(ov.Model(node.outputs(), [x]), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("kind", [(4, 128, False), (8, CHANNEL_WISE, True)], ids=["int4-sym", "int8-asym"])
@pytest.mark.parametrize("tokens", [1, 3, 70])
def test_matrices_that_share_an_input_agree_with_numpy(isa: str, bits: int, kind: Any, tokens: int) -> None:
    rng = np.random.default_rng(tokens)
    # Sizes with and without a rest of 16.
    matrices = [random_weights(rng, outputs, 256, *kind) for outputs in (64, 16, 37)]
    model = build_linear(matrices, isa=isa, activation_bits=bits)
    x = rng.standard_normal((tokens, 256)).astype(np.float32)
    results = model.create_infer_request().infer([x[None]])
    for index, matrix in enumerate(matrices):
        expected = x.astype(np.float64) @ dequantized(matrix).T
        assert_close(np.array(results[index])[0], expected, bits)


def test_a_row_that_is_not_finite_stays_alone_in_projections() -> None:
    rng = np.random.default_rng(0)
    model = build_linear([random_weights(rng, 24, 64), random_weights(rng, 16, 64)])
    x = rng.standard_normal((5, 64)).astype(np.float32)
    x[1, 3], x[4, 0] = np.nan, np.inf
    for result in model.create_infer_request().infer([x[None]]).values():
        assert np.isnan(np.array(result)[0]).all(axis=1).tolist() == [False, True, False, False, True]


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"outputs": [16]}, "weights of 1 matrices, found 3 inputs"),
        ({"outputs": [16, 32]}, "packed weights are damaged"),
        ({"inputs": 32}, "damaged|features"),
        ({"group": 48}, "group size must be 32, 64, 128 or -1, found 48"),
        ({"isa": "z80"}, "no kernels named z80"),
    ],
)
def test_projections_that_do_not_fit_are_refused(attributes: dict[str, Any], message: str) -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(RuntimeError, match=message):
        build_linear([random_weights(rng, 16, 64), random_weights(rng, 16, 64)], **attributes)


weights = st.tuples(st.sampled_from([4, 8]), st.sampled_from(layout.GROUPS), st.booleans())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    hidden=st.integers(1, 9),
    neurons=st.integers(1, 9),
    odd=st.booleans(),
    up=weights,
    down=weights,
    tokens=st.integers(1, 9),
    bits=st.sampled_from([8, 16]),
    active=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_group_agrees_with_numpy(
    hidden: int, neurons: int, odd: bool, up: Any, down: Any, tokens: int, bits: int, active: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)

    def size(steps: int, group: int) -> int:
        # Sizes that no block divides exist only with one scale a row.
        return steps * 37 if group == CHANNEL_WISE and odd else steps * (32 if group == CHANNEL_WISE else group)

    inputs, outputs = size(hidden, up[1]), size(neurons, down[1])
    w_up, w_down = random_weights(rng, outputs, inputs, *up), random_weights(rng, inputs, outputs, *down)
    x = np.abs(rng.standard_normal((tokens, inputs))).astype(np.float32)
    # The sign of a row of up decides about its neuron when all activations are positive.
    w_up.codes[:] = np.where(rng.random((outputs, 1)) < active, (1 << up[0]) - 1, 0)
    if w_up.zeros is not None:
        w_up.zeros[:] = 1 << up[0] - 1
    model = build_model(w_up, w_down, activation_bits=bits)
    assert_close(run(model, x), ffn(x, w_up, w_down), bits)


@pytest.mark.parametrize("tokens", [1, 3, 8])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_non_finite_activation_makes_its_own_row_nan_and_no_other(tokens: int, bad: float) -> None:
    rng = np.random.default_rng(0)
    up, down = random_weights(rng, 256, 128), random_weights(rng, 128, 256)
    x = rng.standard_normal((tokens, 128)).astype(np.float32)
    clean = run(build_model(up, down), x)
    x[-1, 77] = bad
    y = run(build_model(up, down), x)
    assert np.isnan(y[-1]).all()
    np.testing.assert_array_equal(y[:-1], clean[:-1])


@pytest.mark.parametrize("tokens", [1, 5])
def test_a_square_that_overflows_is_nan_not_garbage(tokens: int) -> None:
    rng = np.random.default_rng(0)
    up, down = random_weights(rng, 256, 128), random_weights(rng, 128, 256)
    x = np.full((tokens, 128), 1e30, np.float32)
    assert np.isnan(run(build_model(up, down), x)).all()


def test_zero_tokens_give_an_empty_output() -> None:
    rng = np.random.default_rng(0)
    model = build_model(random_weights(rng, 256, 128), random_weights(rng, 128, 256))
    assert run(model, np.zeros((0, 128), np.float32)).shape == (0, 128)


def test_all_zero_activations_give_zero() -> None:
    rng = np.random.default_rng(0)
    model = build_model(random_weights(rng, 256, 128), random_weights(rng, 128, 256))
    for tokens in (1, 5):
        assert not run(model, np.zeros((tokens, 128), np.float32)).any()


def test_threshold_skips_neurons_at_or_below_it() -> None:
    rng = np.random.default_rng(0)
    up, down = random_weights(rng, 256, 128), random_weights(rng, 128, 256)
    x = rng.standard_normal((3, 128)).astype(np.float32)
    model = build_model(up, down, threshold=0.5, activation_bits=16)
    assert_close(run(model, x), ffn(x, up, down, threshold=0.5), 16)


def test_results_repeat_exactly_and_tokens_do_not_see_each_other() -> None:
    rng = np.random.default_rng(0)
    model = build_model(random_weights(rng, 1024, 128), random_weights(rng, 128, 1024), activation_bits=16)
    x = rng.standard_normal((40, 128)).astype(np.float32)
    first = run(model, x)
    for _ in range(5):
        np.testing.assert_array_equal(run(model, x), first)
    for t in (0, 39):
        np.testing.assert_allclose(run(model, x[t : t + 1])[0], first[t], rtol=1e-3, atol=1e-4)


def test_concurrent_requests_give_what_single_ones_give() -> None:
    from concurrent.futures import ThreadPoolExecutor

    rng = np.random.default_rng(0)
    model = build_model(random_weights(rng, 1024, 128), random_weights(rng, 128, 1024))
    inputs = [rng.standard_normal((1 + i % 5, 128)).astype(np.float32) for i in range(24)]
    expected = [run(model, x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for got, want in zip(pool.map(lambda x: run(model, x), inputs), expected, strict=True):
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    "attributes, message",
    [
        ({"isa": "avx1024"}, "no kernels named avx1024"),
        ({"up_group": 16}, "UP group size must be 32, 64, 128 or -1, found 16"),
        ({"neurons": 512}, "packed weights are damaged"),
        ({"hidden": 96}, "activations have 128 features where the weights have 96"),
        ({"activation_bits": 4}, "activation_bits must be 0 (automatic), 8 or 16, found 4"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_operation_that_cannot_be_right_is_refused_by_name(attributes: dict[str, Any], message: str) -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(RuntimeError, match=message.replace("(", r"\(").replace(")", r"\)")):
        build_model(random_weights(rng, 256, 128), random_weights(rng, 128, 256), **attributes)
