"""Checkpoints for embeddings and reranking: what is read of them, what is refused, and proofs of exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import encoders
from support.tiny import edit_json

from ov_afm import export
from ov_afm.cli import main
from ov_afm.conversion import text_encoders
from ov_afm.errors import ConfigError, ExportError, OVAFMError, SourceError
from ov_afm.model_dir.inference import EXACT
from ov_afm.model_dir.manifest import Manifest
from ov_afm.model_dir.model_directory import ModelDirectory
from ov_afm.model_dir.text_encoder import EMBEDDING, RERANKING, TextEncoder
from ov_afm.runtime.text_encoding import Counted, load

TEXTS = ["The cat sat on the mat.", "hello world", "", "Paris is the capital of France, 123! " * 12]
CONFIG = {"hidden_size": 64, "max_position_embeddings": 512, "model_type": "bert"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = encoders.write_encoder(tmp_path_factory.mktemp("checkpoints") / "tiny-bert")
    prompts = {"prompts": {"query": "hello "}, "default_prompt_name": None}
    limit = {"max_seq_length": 32, "do_lower_case": False}
    return encoders.write_sentence_files(folder, sentence_bert_config=limit, config_sentence_transformers=prompts)


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    (checkpoint / "LICENSE").write_text("A licence text that must travel with the model.\n")
    output = tmp_path_factory.mktemp("models") / "tiny-bert"
    return export(checkpoint, output, recipe="fp32", task=EMBEDDING).path


def source_embeddings(checkpoint: Path, kind: str, facts: TextEncoder) -> Any:
    """What transformers gives for the texts, all in one padded batch, pooled as sentence-transformers does."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    model = getattr(transformers, kind).from_pretrained(checkpoint).eval()
    options = {"padding": True, "truncation": True, "max_length": facts.max_tokens, "return_tensors": "pt"}
    with torch.no_grad():
        if facts.task == RERANKING:
            return model(**tokenizer(["hello paris"] * len(TEXTS), TEXTS, **options)).logits.sigmoid().numpy()
        inputs = tokenizer(TEXTS, **options)
        hidden, mask = model(**inputs).last_hidden_state, inputs["attention_mask"].unsqueeze(-1)
        rows = hidden[:, 0] if facts.pooling == "cls" else (hidden * mask).sum(1) / mask.sum(1)
        return (torch.nn.functional.normalize(rows) if facts.normalize else rows).numpy()


@pytest.mark.slow
def test_embeddings_are_those_of_transformers(checkpoint: Path, exported: Path) -> None:
    model = ModelDirectory.open(exported, any_task=True)
    facts = model.text_encoder
    assert facts is not None
    assert (facts.pooling, facts.normalize, facts.max_tokens, facts.dimensions) == ("mean", True, 32, 64)
    assert facts.prompts == {"query": "hello "}
    loaded = load(exported, facts, properties=EXACT)
    rows = loaded.compute(loaded.count_checked(TEXTS, cut=True))
    expected = source_embeddings(checkpoint, "AutoModel", facts)
    assert np.abs(rows - expected).max() < 1e-5
    assert (rows * expected).sum(1).min() > 0.9999
    assert model.checks["encoder"]["cosine_min"] > 0.9999
    assert (exported / "LICENSE").exists()
    assert (exported / "1_Pooling" / "config.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "changes", "recipe"),
    [
        ("RobertaModel", {"pad_token_id": 0}, "int8"),
        ("MPNetModel", {}, "fp16"),
        ("BertForSequenceClassification", {"num_labels": 1}, "int8"),
    ],
    ids=["roberta-int8", "mpnet-fp16", "reranker-int8"],
)
def test_other_encoders_and_recipes(kind: str, changes: dict[str, Any], recipe: str, tmp_path: Path) -> None:
    source = encoders.write_encoder(tmp_path / "source", kind, **changes)
    task = RERANKING if kind.endswith("Classification") else EMBEDDING
    output = export(source, tmp_path / "model", recipe=recipe, task=task).path
    model = ModelDirectory.open(output, any_task=True)
    facts = model.text_encoder
    assert facts is not None
    loaded = load(output, facts, properties=EXACT)
    query = "hello paris" if task == RERANKING else None
    rows = loaded.compute(loaded.count_checked(TEXTS, query=query, cut=True), query=query)
    automatic = "AutoModelForSequenceClassification" if task == RERANKING else "AutoModel"
    expected = source_embeddings(source, automatic, facts)
    if task == RERANKING:
        assert np.abs(rows - expected).max() < 0.05
    else:
        cosine = (rows * expected).sum(1) / np.linalg.norm(rows, axis=1) / np.linalg.norm(expected, axis=1)
        assert cosine.min() > 0.99
    assert set(model.checks) == {"tokenizer", "encoder", "encoder_compression"}


@pytest.mark.slow
def test_finished_export_is_found_and_another_is_refused(checkpoint: Path, exported: Path) -> None:
    assert export(checkpoint, exported, recipe="fp32", task=EMBEDDING).log is None
    with pytest.raises(ConfigError, match="holds another model"):
        export(checkpoint, exported, recipe="int8", task=EMBEDDING)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["generate", "bench", "evaluate", "compress"])
def test_commands_that_need_text_refuse_it_in_a_line(
    command: str, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {"generate": ["hi"], "compress": ["--output", str(tmp_path / "x")]}.get(command, [])
    assert main([command, str(exported), *more]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "is a model for embeddings" in line


@pytest.mark.slow
def test_info_tells_the_task(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(exported), "--verify"]) == 0
    text = capsys.readouterr().out
    assert "feature-extraction" in text
    assert "64 numbers, of length 1, mean pooling" in text
    assert "texts of up to 32 tokens" in text


def test_wrong_conversion_is_no_export() -> None:
    measured = np.ones((3, 4), np.float32)
    expected = measured.copy()
    expected[1, 2] = -1
    facts = TextEncoder(EMBEDDING, 32, 4, pooling="mean")
    with pytest.raises(ExportError) as raised:
        text_encoders._judge(measured, expected, facts)
    assert raised.value.code == "encoder-differs"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dense": ({"modules": ("Transformer", "Pooling", "Dense")}, "Dense"),
    "static": ({"modules": ("StaticEmbedding",)}, "StaticEmbedding"),
    "max": ({"pooling": {"pooling_mode_max_tokens": True}}, "max_tokens"),
    "two": ({"pooling": {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}}, "cls_token, mean_tokens"),
    "lower": ({"sentence_bert_config": {"do_lower_case": True}}, "do_lower_case"),
    "distance": ({"config_sentence_transformers": {"similarity_fn_name": "euclidean"}}, "euclidean"),
}


@pytest.mark.parametrize(("files", "named"), REFUSED.values(), ids=REFUSED)
def test_what_genai_cannot_do_is_refused_by_name(files: dict[str, Any], named: str, tmp_path: Path) -> None:
    encoders.write_sentence_files(tmp_path, **files)
    with pytest.raises(SourceError, match=named) as raised:
        text_encoders.read(tmp_path, EMBEDDING, CONFIG, "x")
    assert raised.value.code == "encoder-unsupported"


def test_pooling_length_and_prompts_come_from_the_files(tmp_path: Path) -> None:
    encoders.write_sentence_files(
        tmp_path,
        pooling={"pooling_mode": "lasttoken"},
        modules=("Transformer", "Pooling"),
        sentence_bert_config={"max_seq_length": 100},
        config_sentence_transformers={"prompts": {"query": "q: ", "document": ""}, "default_prompt_name": "query"},
    )
    facts = text_encoders.read(tmp_path, EMBEDDING, CONFIG, "x")
    assert (facts.pooling, facts.normalize, facts.max_tokens) == ("last_token", False, 100)
    assert (facts.prompts, facts.default_prompt) == ({"query": "q: "}, "query")


def test_positions_of_roberta_begin_after_padding(tmp_path: Path) -> None:
    config = {**CONFIG, "model_type": "xlm-roberta", "max_position_embeddings": 514, "pad_token_id": 1}
    assert text_encoders.read(tmp_path, EMBEDDING, config, "x").max_tokens == 512


@pytest.mark.parametrize("recipe", ["int4", "int8-quality"])
def test_recipes_for_decoders_are_refused(recipe: str, tmp_path: Path) -> None:
    from ov_afm.presets import RECIPES

    with pytest.raises(ConfigError) as raised:
        text_encoders.check_recipe(RECIPES[recipe], EMBEDDING)
    assert raised.value.code == "recipe-not-for-encoders"


def test_another_task_is_named_where_the_architecture_is_for_it(tmp_path: Path) -> None:
    edit = tmp_path / "config.json"
    edit.write_text("{}")
    edit_json(edit, architectures=["BertModel"])
    with pytest.raises(SourceError, match="--task feature-extraction"):
        export(tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    "change",
    [{"max_tokens": "many"}, {"pooling": "max"}, {"normalize": 1}, {"prompts": {"query": 1}}, {"task": "chat"}],
    ids=str,
)
def test_damaged_manifest_is_refused_in_a_line(change: dict[str, Any], tmp_path: Path) -> None:
    from ov_afm.model_dir import manifest

    facts = TextEncoder(EMBEDDING, 32, 4, pooling="mean")
    contents = Manifest({"kind": "folder", "id": "x"}, None, {"name": "fp32"}, text_encoder=facts)
    manifest.write(tmp_path, contents)
    assert manifest.read(tmp_path) == contents
    path = tmp_path / manifest.FILE_NAME
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "text_encoder": {**fields["text_encoder"], **change}}))
    with pytest.raises(OVAFMError) as raised:
        manifest.read(tmp_path)
    assert raised.value.code == "manifest-damaged"


def test_texts_of_like_length_are_computed_together() -> None:
    counted = Counted(["x"] * 200, [(7 * index) % 500 + 1 for index in range(200)])
    batches = list(counted.batches())
    assert sorted(place for batch in batches for place in batch) == list(range(200))
    for batch in batches:
        assert len(batch) * max(counted.tokens[each] for each in batch) <= 8192
        assert len(batch) <= 64
