"""Pruning: the shape that a target asks for, the refit that earns its name, and a checkpoint that exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny

from ov_afm.cli.prune import main
from ov_afm.errors import CompressionError, ConfigError
from ov_afm.pruning import distill
from ov_afm.pruning.checkpoint import block_influence
from ov_afm.pruning.plan import parse_count, plan
from ov_afm.pruning.prune import prune
from ov_afm.pruning.width import narrow
from ov_afm.quantization import calibration

AFM = {
    "architectures": ["ArceeForCausalLM"],
    "hidden_size": 2560,
    "num_hidden_layers": 36,
    "num_attention_heads": 20,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 18432,
    "vocab_size": 128_004,
    "max_position_embeddings": 65_536,
    "hidden_act": "relu2",
    "tie_word_embeddings": False,
}


def random_model(**changes: Any) -> Any:
    from transformers import ArceeConfig, ArceeForCausalLM

    torch.manual_seed(0)
    return ArceeForCausalLM(ArceeConfig(**{**tiny.ARCEE, **changes})).eval()


def random_ids(count: int, length: int = 64) -> list[list[int]]:
    return torch.randint(3, 512, (count, length), generator=torch.Generator().manual_seed(1)).tolist()


# -- The plan


def test_edge_size_is_reached_through_the_mlps_alone() -> None:
    found = plan(AFM, parse_count("2.8B"))
    assert found.geometry.layers == 36
    assert 8_400 <= found.geometry.intermediate <= 8_640
    assert found.geometry.intermediate % 64 == 0
    assert 2.78e9 < found.parameters <= 2.8e9
    assert found.reason == f"the MLPs alone: {found.geometry.intermediate} of 18432 neurons in each, all 36 layers"


def test_iot_size_takes_depth_and_width_and_says_why() -> None:
    found = plan(AFM, parse_count("1.2B"))
    assert found.geometry.layers < 36
    assert found.geometry.intermediate < 18432
    assert 1.1e9 < found.parameters <= 1.2e9
    assert found.reason.endswith("the MLPs alone would have to keep less than 40%")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (5_000_000_000, "the model has 4.619 B parameters already, no more than the target of 5.000 B"),
        (700_000_000, "0.700 B parameters cannot be reached: embedding, head and the smallest layers have "),
    ],
)
def test_target_out_of_reach_is_refused_with_figures(target: int, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(AFM, target)
    assert str(caught.value).startswith(message)


def test_the_minimum_that_is_named_can_be_reached() -> None:
    with pytest.raises(ConfigError) as caught:
        plan(AFM, 1_000_000)
    minimum = float(str(caught.value).split("layers have ")[1].split(" B")[0]) + 0.001
    assert plan(AFM, int(minimum * 1e9)).parameters <= minimum * 1e9


def test_rows_and_heads_that_go_leave_more_for_the_mlps() -> None:
    target = parse_count("2.8B")
    plain, found = plan(AFM, target), plan(AFM, target, vocab=100_004, kv_heads=2)
    # 28,000 rows in two matrices, and half of 36 layers' attention.
    freed = 2 * 28_000 * 2560 + 36 * 2560 * 128 * 2 * (10 + 2)
    assert found.geometry.intermediate - plain.geometry.intermediate == pytest.approx(freed / (36 * 2 * 2560), abs=64)
    assert found.parameters <= target
    assert found.reason == (
        "100004 of 128004 rows of the vocabulary; 2 of 4 KV heads and 10 of 20 query heads in each layer; "
        f"the MLPs alone: {found.geometry.intermediate} of 18432 neurons in each, all 36 layers"
    )


def test_target_that_rows_alone_reach_leaves_the_rest() -> None:
    found = plan(AFM, parse_count("4.5B"), vocab=90_004)
    assert (found.geometry.layers, found.geometry.intermediate, found.geometry.kv_heads) == (36, 18432, 4)
    assert found.reason == "90004 of 128004 rows of the vocabulary"
    assert not found.narrowed


def test_heads_that_transformers_would_refuse_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        plan(AFM, kv_heads=3)
    assert str(caught.value) == (
        "3 KV heads leave 15 query heads, and transformers wants a number that divides the hidden size 2560; "
        "KV heads to keep may be 1, 2, 4"
    )


def test_heads_with_biases_are_refused() -> None:
    with pytest.raises(ConfigError, match="^KV heads are pruned in attention without biases; "):
        plan({**AFM, "attention_bias": True}, kv_heads=2)


@pytest.mark.parametrize("text", ["", "0", "-3B", "big", "2.8Bn"])
def test_target_that_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is no number of parameters; give one such as 2.8B or 120M"):
        parse_count(text)


# -- The pruning


def loss_against(model: Any, expected: Any, ids: Any) -> float:
    with torch.no_grad():
        found = model(ids, use_cache=False).logits.log_softmax(-1)
    return float((expected.exp() * (expected - found)).sum(-1).mean())


def test_refit_beats_no_refit_on_text_that_it_has_not_seen() -> None:
    unseen = torch.tensor(random_ids(8))
    with torch.no_grad():
        expected = random_model()(unseen, use_cache=False).logits.log_softmax(-1)
    losses = {}
    for refit in (True, False):
        model = random_model()
        calibration_ids = torch.randint(3, 512, (24, 64), generator=torch.Generator().manual_seed(9)).tolist()
        narrow(model, calibration_ids, intermediate=64, refit=refit)
        losses[refit] = loss_against(model, expected, unseen)
    assert losses[True] < 0.9 * losses[False]


def test_neurons_that_never_fire_cost_nothing_to_prune() -> None:
    model, ids = random_model(), random_ids(2)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, ::2] = 0
        expected = model(torch.tensor(ids), use_cache=False).logits
        kept = narrow(model, ids, intermediate=64, refit=False)
        found = model(torch.tensor(ids), use_cache=False).logits
    assert kept.neurons == pytest.approx([1, 1])
    assert torch.allclose(found, expected, atol=1e-4)
    assert model.config.intermediate_size == 64


def test_layer_that_does_nothing_has_no_influence() -> None:
    model = random_model(num_hidden_layers=3)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
        model.model.layers[1].mlp.down_proj.weight.zero_()
    influence = block_influence(model, random_ids(2))
    assert influence[1] == pytest.approx(0, abs=1e-5)
    assert min(influence[0], influence[2]) > 1e-3


# -- Heads


def test_keeping_all_heads_changes_nothing() -> None:
    model, ids = random_model(), random_ids(4)
    with torch.no_grad():
        expected = model(torch.tensor(ids), use_cache=False).logits
        kept = narrow(model, ids, kv_heads=2)
        found = model(torch.tensor(ids), use_cache=False).logits
    assert kept.kv_heads == [[0, 1], [0, 1]]
    assert kept.attention == pytest.approx([1, 1])
    assert not kept.neurons
    assert torch.allclose(found, expected, atol=1e-4)


def test_heads_that_do_nothing_cost_nothing_to_prune() -> None:
    model, ids = random_model(), random_ids(2)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[:, :32] = 0  # the two query heads of KV head 0
        expected = model(torch.tensor(ids), use_cache=False).logits
        kept = narrow(model, ids, kv_heads=1, refit=False)
        found = model(torch.tensor(ids), use_cache=False).logits
    assert kept.kv_heads == [[1], [1]]
    assert torch.allclose(found, expected, atol=1e-5)


def test_refit_of_heads_beats_no_refit_on_text_that_it_has_not_seen() -> None:
    def related() -> Any:
        """A model whose second KV head looks about where the first looks, and reads about the same there."""
        model = random_model()
        with torch.no_grad():
            for layer in model.model.layers:
                attention = layer.self_attn
                for matrix, rows in ((attention.q_proj, 32), (attention.k_proj, 16), (attention.v_proj, 16)):
                    matrix.weight[rows:] = 0.2 * matrix.weight[rows:] + 0.8 * matrix.weight[:rows]
        return model

    unseen = torch.tensor(random_ids(8))
    with torch.no_grad():
        expected = related()(unseen, use_cache=False).logits.log_softmax(-1)
    losses = {}
    for refit in (True, False):
        model = related()
        ids = torch.randint(3, 512, (24, 64), generator=torch.Generator().manual_seed(9)).tolist()
        narrow(model, ids, kv_heads=1, refit=refit)
        losses[refit] = loss_against(model, expected, unseen)
    assert losses[True] < 0.9 * losses[False]


def test_fewer_heads_and_neurons_load_with_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, ids = random_model(), random_ids(4)
    narrow(model, ids, intermediate=64, kv_heads=1)
    with torch.no_grad():
        expected = model(torch.tensor(ids), use_cache=False).logits
    model.save_pretrained(tmp_path / "small")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    assert (again.config.num_attention_heads, again.config.num_key_value_heads) == (2, 1)
    assert again.config.head_dim == 16
    with torch.no_grad():
        found = again(torch.tensor(ids)).logits
    assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.slow
def test_command_drops_heads_and_the_result_exports(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from ov_afm import Pipeline, export
    from ov_afm.runtime.sampling import Params

    out = tmp_path / "small"
    assert main([str(tiny_checkpoint), "--kv-heads", "1", "-o", str(out), "--num-samples", "8"]) == 0
    report = json.loads((out / "ov_afm_prune.json").read_text())
    assert report["plan"]["reason"] == "1 of 2 KV heads and 2 of 4 query heads in each layer"
    assert [len(each) for each in report["kv_heads_kept"]] == [1, 1]
    assert 0 < report["attention_energy_kept"] < 1
    assert report["energy_kept"] is None
    with Pipeline(export(str(out), tmp_path / "int8", recipe="int8").path) as pipeline:
        assert pipeline.generate("The quick", Params(max_new_tokens=8, ignore_eos=True)).text


@pytest.mark.slow
def test_command_writes_a_checkpoint_that_transformers_loads(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    out = tmp_path / "small"
    words = ["--target-params", "110K", "-o", str(out), "--num-samples", "8", "--heal", "0.02", "--json"]
    curve = tmp_path / "curve.svg"
    assert main([str(tiny_checkpoint), *words, "--plot", str(curve)]) == 0
    assert curve.read_bytes().startswith(b"<?xml")
    curve.unlink()
    report = json.loads(capsys.readouterr().out)
    assert report["plan"]["parameters"] <= 110_000
    assert report["pruned"]["kl_mean"]["value"] > 0
    assert report["healing"]["steps"] >= 1
    assert report["healed"]["perplexity"]["value"] > 1
    assert set(report["prefill_tokens_per_s"]) == {"before", "after"}
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.intermediate_size == report["plan"]["intermediate"] == 64
    assert str(model.dtype) == "torch.bfloat16"
    assert (out / "LICENSE").read_text() == (tiny_checkpoint / "LICENSE").read_text()
    assert (out / "chat_template.jinja").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small"]


def test_nan_weight_is_named_and_nothing_is_left(tiny_checkpoint: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(tiny_checkpoint, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CompressionError) as caught:
        prune(broken, tmp_path / "out", target_params="100K")
    assert str(caught.value) == (
        "model.layers.1.mlp.up_proj.weight holds weights that are not finite; fetch the checkpoint again"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken"]


def test_model_without_relu2_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    import shutil

    other = tmp_path / "other"
    shutil.copytree(tiny_checkpoint, other)
    tiny.edit_json(other / "config.json", hidden_act="silu")
    with pytest.raises(CompressionError) as caught:
        prune(other, tmp_path / "out", target_params="100K")
    assert str(caught.value) == "prune takes checkpoints with a ReLU² MLP, found activation silu in other"


def test_curve_without_healing_is_a_usage_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["none", "-o", str(tmp_path / "out"), "--target-params", "100K", "--plot", "curve.svg"])
    assert caught.value.code == 2
    assert "--plot draws the loss curve of healing; add --heal MINUTES" in capsys.readouterr().err


def test_negative_minutes_are_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="^minutes of healing must not be negative, found -1"):
        prune(tiny_checkpoint, tmp_path / "out", target_params="100K", heal_minutes=-1)


# -- Healing


@pytest.fixture
def pair(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A teacher and a student with half of its neurons, as float32 so that small steps are kept."""
    import shutil

    # Tiny models take steps that would wreck a real one.
    monkeypatch.setattr(distill, "RATE", {"full": 2e-3, "lora": 1e-2})

    teacher, student = tmp_path / "teacher", tmp_path / "student"
    shutil.copytree(tiny_checkpoint, teacher)
    random_model().save_pretrained(teacher)
    model = random_model()
    narrow(model, random_ids(8), intermediate=64, refit=False)
    model.save_pretrained(student)
    return student, teacher


def heal(pair: tuple[Path, Path], state: Path, *, max_steps: int) -> dict[str, Any]:
    return distill.heal(*pair, state, dataset=calibration.PACKAGED, num_samples=4, minutes=5.0, max_steps=max_steps)


def test_healing_brings_the_student_nearer(pair: tuple[Path, Path], tmp_path: Path) -> None:
    found = heal(pair, tmp_path / "state", max_steps=16)
    assert found["method"] == "full"
    assert found["steps"] == 16
    assert found["losses"][-1] < 0.9 * found["losses"][0]


def test_interrupted_healing_is_continued(pair: tuple[Path, Path], tmp_path: Path) -> None:
    state = tmp_path / "state"
    heal(pair, state, max_steps=3)
    found = heal(pair, state, max_steps=5)
    assert found["steps"] == 5
    assert len(found["losses"]) == 5


def test_large_models_are_healed_through_adapters(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(distill, "FULL_PARAMETERS", 0)
    found = heal(pair, tmp_path / "state", max_steps=12)
    assert found["method"] == "lora"
    assert found["losses"][-1] < found["losses"][0]
    names = AutoModelForCausalLM.from_pretrained(pair[0]).state_dict()
    assert not any("lora" in name for name in names)
