"""Graph surgery on real exports: found by structure, exact, and never in the way of the plain model."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from support import tiny

from ov_afm import evaluate
from ov_afm.cli import kernels
from ov_afm.errors import ConfigError, ExtensionError, OVAFMError
from ov_afm.kernels import extension, graph, pack, profile, select
from ov_afm.model_dir import manifest
from ov_afm.model_dir.inference import EXACT, decoder_inputs, input_names
from ov_afm.model_dir.model_directory import PACKED_FOLDER, ModelDirectory
from ov_afm.quantization.calibration import PACKAGED_TEXT

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("library")]
WEIGHTS = "openvino_model.bin"


def compressed(exported: Path, output: Path, **options: Any) -> Path:
    """A copy of an f32 model directory, compressed as optimum-cli does it: with one call of NNCF."""
    shutil.copytree(exported, output)
    if options:
        import nncf
        import openvino

        mode = nncf.CompressWeightsMode(options.pop("mode"))
        model = openvino.Core().read_model(exported / "openvino_model.xml")
        model = nncf.compress_weights(model, mode=mode, **options)
        openvino.save_model(model, output / "openvino_model.xml", compress_to_fp16=False)
    return output


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Arcee model as an f32 model directory."""
    import openvino
    from openvino_tokenizers import convert_tokenizer
    from optimum.intel import OVModelForCausalLM
    from transformers import AutoTokenizer

    checkpoint = tiny.write_arcee(tmp_path_factory.mktemp("checkpoints") / "arcee", intermediate_size=384)
    output = tmp_path_factory.mktemp("models") / "f32"
    model = OVModelForCausalLM.from_pretrained(checkpoint, export=True, compile=False, load_in_8bit=False)
    model.save_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.save_pretrained(output)
    names = ("openvino_tokenizer", "openvino_detokenizer")
    for name, part in zip(names, convert_tokenizer(tokenizer, with_detokenizer=True), strict=True):
        openvino.save_model(part, output / f"{name}.xml")
    return output


@pytest.fixture(scope="module")
def plain(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compressed(exported, tmp_path_factory.mktemp("models") / "int4", mode="int4_sym", group_size=32)


@pytest.fixture(scope="module")
def packed(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with a manifest and the rewritten model in it. Read-only."""
    path = tmp_path_factory.mktemp("packed") / "model"
    shutil.copytree(plain, path)
    manifest.write(path, manifest.Manifest(source={}, geometry=None, recipe={}, files=manifest.scan(path)))
    result = pack.transform(path, activations="int16")
    assert result.replaced == ["layer 0", "layer 1"]
    assert result.refused == {}
    return path


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "model"))


def logits(folder: Path, libraries: list[Path], tokens: int) -> np.ndarray:
    import openvino

    core = openvino.Core()
    for path in libraries:
        core.add_extension(str(path))
    compiled = core.compile_model(folder / "openvino_model.xml", "CPU", EXACT)
    ids = np.random.default_rng(0).integers(3, 512, tokens)
    return np.array(compiled.create_infer_request().infer(decoder_inputs(ids, input_names(compiled)))["logits"])


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize(
    "options",
    [
        {"mode": "int4_sym", "group_size": 32},
        {"mode": "int4_sym", "group_size": -1},
        {"mode": "int4_asym", "group_size": 64},
        {"mode": "int8_asym"},
        {"mode": "int8_sym"},
        {"mode": "int4_sym", "group_size": 64, "ratio": 0.6},
    ],
    ids=["int4-g32", "int4-channel-wise", "int4-asym-g64", "int8-asym", "int8-sym", "mixed"],
)
def test_every_compression_that_nncf_writes_gives_the_same_logits(
    exported: Path, tmp_path: Path, library: Path, options: dict[str, Any], tokens: int
) -> None:
    model = compressed(exported, tmp_path / "model", **options)
    result = pack.transform(model, activations="int16")
    assert result.replaced == ["layer 0", "layer 1"]
    expected, got = logits(model, [], tokens), logits(result.path, [library], tokens)
    assert np.abs(got - expected).max() < 2e-3 * np.abs(expected).max()


def test_packed_constants_are_those_of_the_plain_model(packed: Path, library: Path) -> None:
    pack.verify(packed, packed / PACKED_FOLDER, library)


def test_projections_are_packed_and_the_engine_takes_the_head_for_a_matmul(packed: Path, library: Path) -> None:
    model = graph.read_model(packed / PACKED_FOLDER / "openvino_model.xml", library)
    kinds = [op.get_type_name() for op in model.get_ordered_ops()]
    # Queries, keys and values are one operation, the output of attention another.
    assert kinds.count("PackedLinear") == 4
    record = manifest.read(packed)
    assert record is not None
    assert record.sparsity["kernels"]["projections"] == 9
    head = model.get_results()[0].input_value(0).get_node()
    assert head.get_type_name() == "PackedHead"
    # GenAI computes the logits of the last token alone where it finds one.
    assert head.get_type_info().parent.name == "MatMul"


def test_projections_can_be_left_as_they_are(plain: Path, library: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(plain, tmp_path / "model"))
    assert pack.transform(path, projections=False).projections == 0
    model = graph.read_model(path / PACKED_FOLDER / "openvino_model.xml", library)
    assert not {"PackedLinear", "PackedHead"} & {op.get_type_name() for op in model.get_ordered_ops()}


@pytest.mark.parametrize(
    ("kind", "name"), [("ReLU2FFN", "layer 1"), ("PackedLinear", "layer 1"), ("PackedHead", ".*lm_head.*")]
)
def test_a_changed_packed_byte_is_found_and_its_layer_named(copy: Path, library: Path, kind: str, name: str) -> None:
    model = graph.read_model(copy / PACKED_FOLDER / "openvino_model.xml", library)
    node = [op for op in model.get_ordered_ops() if op.get_type_name() == kind][-1]
    packed = bytes(node.inputs()[-1].get_source_output().get_node().data)
    del model, node
    raw = bytearray((copy / PACKED_FOLDER / WEIGHTS).read_bytes())
    raw[raw.index(packed) + 100] ^= 0x10
    (copy / PACKED_FOLDER / WEIGHTS).write_bytes(raw)
    with pytest.raises(ExtensionError, match=f"packed weights of {name} are not those of"):
        pack.verify(copy, copy / PACKED_FOLDER, library)


def test_constants_are_aligned_for_use_in_place(packed: Path) -> None:
    tree = ElementTree.parse(packed / PACKED_FOLDER / "openvino_model.xml")
    places = [(int(data.get("offset")), int(data.get("size"))) for data in tree.iter("data") if data.get("offset")]
    assert len(places) > 20
    for offset, size in places:
        assert offset % (4096 if size >= 64 * 1024 else 64) == 0


@pytest.mark.parametrize("backend", ["PA", "SDPA"])
def test_genai_answers_alike_with_and_without_kernels(packed: Path, backend: str) -> None:
    import openvino_genai

    config = openvino_genai.GenerationConfig(max_new_tokens=12, ignore_eos=True, apply_chat_template=False)
    answers = []
    for folder, properties in ((packed, {}), select.engine_model(packed, "CPU")):
        pipeline = openvino_genai.LLMPipeline(folder, "CPU", ATTENTION_BACKEND=backend, **EXACT, **properties)
        inputs = pipeline.get_tokenizer().encode("The quick brown fox")
        answers.append(pipeline.generate(inputs, config).tokens[0])
    assert answers[0] == answers[1]


def test_the_plain_model_is_untouched_and_the_manifest_knows_all(packed: Path, plain: Path) -> None:
    assert manifest.sha256(packed / WEIGHTS) == manifest.sha256(plain / WEIGHTS)
    record = manifest.verify(packed, hashes=True)
    assert record is not None
    assert "relu2/openvino_model.bin" in record.files
    assert record.sparsity["kernels"]["replaced"] == ["layer 0", "layer 1"]
    assert record.sparsity["kernels"]["openvino"] == extension.runtime_version()


def test_portable_leaves_only_the_plain_model(copy: Path, plain: Path) -> None:
    assert kernels.main([str(copy), "--portable"]) == 0
    assert not (copy / PACKED_FOLDER).exists()
    record = manifest.verify(copy, hashes=True)
    assert record is not None
    assert "kernels" not in record.sparsity
    assert set(record.files) == set(manifest.scan(plain))


def test_a_model_without_relu2_is_refused_politely(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    import openvino
    from openvino import opset13 as op

    other = Path(shutil.copytree(plain, tmp_path / "silu"))
    x = op.parameter([1, 64], np.float32)
    product = op.matmul(op.swish(x), op.constant(np.ones((64, 64), np.float32)), False, True)
    openvino.save_model(openvino.Model([product], [x]), other / "openvino_model.xml")
    assert kernels.main([str(other)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("ov-afm: error: ") and error.count("\n") == 1
    assert "has no ReLU² MLP, so the kernels cannot help it" in error
    assert not (other / PACKED_FOLDER).exists()


def test_uncompressed_weights_are_refused_with_the_reason(exported: Path, tmp_path: Path) -> None:
    model = compressed(exported, tmp_path / "f32")
    with pytest.raises(ExtensionError, match="the weights are not compressed to int4 or int8"):
        pack.transform(model)


def test_a_group_size_that_kernels_lack_is_refused_by_name(exported: Path, tmp_path: Path) -> None:
    model = compressed(exported, tmp_path / "g16", mode="int4_sym", group_size=16)
    with pytest.raises(ExtensionError, match="group sizes 32, 64, 128 and -1 .channel-wise., found 16"):
        pack.transform(model)


@pytest.mark.parametrize(
    "options, message",
    [({"activations": "int4"}, "activations 'int4' are unknown"), ({"threshold": -1.0}, "threshold must be 0")],
)
def test_options_out_of_range_are_named(plain: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pack.transform(plain, **options)


def test_a_failed_run_leaves_no_half_model(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Path(shutil.copytree(plain, tmp_path / "model"))

    def differ(*_: Any) -> None:
        raise ExtensionError("differs")

    monkeypatch.setattr(pack, "verify", differ)
    with pytest.raises(OVAFMError, match="differs"):
        pack.transform(model)
    assert not (model / PACKED_FOLDER).exists()


def test_killed_before_the_manifest_is_written_the_model_stays_whole(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pack, "_note", killed)
    with pytest.raises(KeyboardInterrupt):
        pack.transform(copy, threshold=0.01)
    # The new packed model is there, and the manifest lists no files of the old one.
    assert ModelDirectory.open(copy, hashes=True).manifest is not None
    assert (copy / PACKED_FOLDER / "openvino_model.xml").exists()


def test_no_manifest_is_invented_for_a_directory_without_one(plain: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(plain, tmp_path / "model"))
    pack.transform(model)
    assert not (model / manifest.FILE_NAME).exists()
    assert json.loads((model / PACKED_FOLDER / "config.json").read_text())["model_type"] == "arcee"


def test_dropping_energy_gives_each_layer_the_largest_threshold_that_keeps_to_it(plain: Path, copy: Path) -> None:
    share = 0.05
    limits = profile.limits(plain, share, PACKAGED_TEXT, max_tokens=profile.LIMITS_WINDOW)
    model = graph.read_model(plain / "openvino_model.xml")
    mlps, _ = graph.find_mlps(model)
    for mlp in mlps:
        model.add_outputs(mlp.up.output(0))
    ids = profile.tokens_of(plain, PACKAGED_TEXT)[: profile.LIMITS_WINDOW]
    ((_, outputs),) = profile.run_windows(model, ids, len(ids), len(mlps))
    step = profile.EDGES[1] / profile.EDGES[0]
    for limit, z in zip(limits, outputs, strict=True):
        energy, at = np.maximum(z, 0).astype(np.float64) ** 4, limit.threshold
        assert energy[z <= at].sum() <= share * energy.sum() < energy[z <= at * step * 1.0001].sum()
        assert limit.active == pytest.approx((z > at).mean(), abs=1e-3)

    assert kernels.main([str(copy), "--drop-energy", str(share)]) == 0
    xml = (copy / PACKED_FOLDER / "openvino_model.xml").read_text()
    written = [float(value) for value in re.findall(r'threshold="([^"]*)"', xml)]
    # Of 512 tokens, not of the 64 above.
    found = profile.limits(copy, share, PACKAGED_TEXT)
    assert written == pytest.approx([limit.threshold for limit in found], rel=1e-5)
    record = manifest.verify(copy)
    assert record is not None
    assert record.sparsity["kernels"]["drop_energy"] == share
    assert 0.0 < record.sparsity["kernels"]["active"] < 0.5


def test_evaluation_does_not_take_the_scores_of_a_model_packed_otherwise(
    packed: Path, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OV_AFM_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    text.write_text("It was a bright cold day in April, and the clocks were striking thirteen. " * 3, encoding="utf-8")
    found = []
    for arguments in ([], ["--threshold", "1000"]):
        assert kernels.main([str(copy), *arguments]) == 0
        found.append(evaluate(copy, packed, text=text, runtime_defaults=True).kl_mean)
    # The second has no active neuron at all.
    assert found[0] < 0.01 < found[1]


def test_no_energy_to_drop_is_exact(plain: Path) -> None:
    assert [limit.threshold for limit in profile.limits(plain, 0.0, PACKAGED_TEXT, max_tokens=16)] == [0.0, 0.0]


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_of_energy_out_of_range_is_refused(plain: Path, share: float) -> None:
    with pytest.raises(ConfigError, match="share of energy to give up must lie between 0 and 1"):
        profile.limits(plain, share, PACKAGED_TEXT)


def test_a_share_of_energy_needs_a_text(plain: Path) -> None:
    with pytest.raises(ConfigError, match="drop_energy needs a text"):
        pack.transform(plain, drop_energy=0.1)


def test_one_threshold_for_all_and_a_share_of_energy_exclude_each_other(plain: Path) -> None:
    with pytest.raises(ConfigError, match="exclude each other; give one"):
        pack.transform(plain, threshold=0.1, drop_energy=0.1)
