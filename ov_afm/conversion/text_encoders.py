"""A checkpoint for embeddings or reranking becomes an IR with its proof.

What sentence-transformers does with an encoder's vectors stands in small files beside the weights. They are read here
once, into the manifest; what GenAI's pipelines cannot do is refused by name.
"""

from __future__ import annotations

import gc
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, ExportError, SourceError
from ..model_dir.inference import EXACT
from ..model_dir.manifest import IR_FILES, MODEL_BIN, MODEL_XML
from ..model_dir.text_encoder import EMBEDDING, POOLING_FILE, RERANKING, TextEncoder
from ..presets import Recipe
from ..quantization.compress_weights import compress_ir
from ..runtime.text_encoding import LoadedEncoder, load
from ..runtime.text_proof import TEXTS, of_tokenizer
from ..system.atomic import disk_full_as_error
from ..system.child_process import Step, emit
from . import source_tokenizer, tensors
from .checkpoint import read_json
from .convert import Converted, Job, write_tokenizer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["FILES", "build", "check_recipe", "read"]

# Of sentence-transformers, beside the checkpoint; copied, so that it can read the result too.
MODULES, SENTENCES, PROMPTS = "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"
FILES = (MODULES, SENTENCES, PROMPTS, POOLING_FILE)
# How sentence-transformers names the ways of pooling that GenAI has.
POOLING = {"cls": "cls", "mean": "mean", "lasttoken": "last_token"}
OLD_POOLING = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "lasttoken",
}
# Tensors of a checkpoint that an encoder without its head has no place for, and one that nothing reads here.
UNUSED = re.compile(r"(.*\.)?embeddings\.position_ids|(cls|lm_head|head|decoder)\..*")
OPTIONAL = re.compile(r"(.*\.)?pooler\..*")
# Below this, nobody has told the tokenizer a length (transformers writes 1e30).
SANE_TOKENS = 10**6
# Two f32 programs differ by 1e-6; a hundred times that is far below any error of conversion.
COSINE_BOUND, SCORE_BOUND = 1 - 1e-4, 1e-4
# A text that must be cut, without minutes of work for models that read very long ones.
PROOF_TOKENS = 1024
QUERY = "What is the capital of France?"


def check_recipe(recipe: Recipe, task: str) -> None:
    """Refuse recipes that are made for decoders.

    Raises:
        ConfigError: It is one.
    """
    if recipe.bits < 8 or recipe.needs_data:
        raise ConfigError(
            f"recipe {recipe.name} is for models that write text; for {task} choose fp32, fp16 or int8",
            code="recipe-not-for-encoders",
        )


def read(folder: Path, task: str, config: Mapping[str, Any], where: str) -> TextEncoder:
    """What the files of a checkpoint say of its use; `parameters` is not among it.

    Args:
        folder: The checkpoint.
        task: `feature-extraction` or `text-classification`.
        config: Its `config.json`.
        where: What to call it in messages.

    Raises:
        SourceError: They ask for what GenAI's pipelines do not do.
    """
    sentences = _optional(folder / SENTENCES)
    if sentences.get("do_lower_case"):
        raise _refused(where, f"{SENTENCES} asks for lower case before the tokenizer (do_lower_case)")
    limit = _max_tokens(folder, config, sentences)
    if task == RERANKING:
        labels = len(config.get("id2label") or {}) or int(config.get("num_labels", 2))
        if labels > 2:
            raise _refused(where, f"it has {labels} labels, and a reranker has one, or two of which the second counts")
        return TextEncoder(task, limit)
    pooling, normalize = _modules(folder, where)
    prompts = _optional(folder / PROMPTS)
    texts = {name: text for name, text in (prompts.get("prompts") or {}).items() if isinstance(text, str) and text}
    chosen = prompts.get("default_prompt_name")
    if prompts.get("similarity_fn_name") not in (None, "cosine", "dot"):
        raise _refused(where, f"its embeddings are compared by {prompts['similarity_fn_name']}, not by cosine or dot")
    shorter = tuple(each for each in config.get("matryoshka_dimensions") or () if isinstance(each, int))
    return TextEncoder(
        task,
        limit,
        dimensions=int(config["hidden_size"]),
        pooling=pooling,
        normalize=normalize,
        prompts=texts,
        default_prompt=chosen if chosen in texts else None,
        shorter=shorter,
        can_shorten=bool(shorter) or config.get("is_matryoshka") is True,
    )


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _refused(where: str, why: str) -> SourceError:
    return SourceError(f"{where} cannot be run by OpenVINO GenAI's pipelines: {why}", code="encoder-unsupported")


def _max_tokens(folder: Path, config: Mapping[str, Any], sentences: Mapping[str, Any]) -> int:
    """The longest text, by the file that says the least."""
    positions = int(config["max_position_embeddings"])
    if config.get("model_type") in ("roberta", "xlm-roberta", "mpnet"):
        # Positions begin after that of padding.
        positions -= int(config.get("pad_token_id", 1)) + 1
    declared = (sentences.get("max_seq_length"), _optional(folder / "tokenizer_config.json").get("model_max_length"))
    return min(
        positions,
        *(int(each) for each in declared if isinstance(each, (int, float)) and 0 < each < SANE_TOKENS),
        SANE_TOKENS,
    )


def _modules(folder: Path, where: str) -> tuple[Any, bool]:
    """Pooling, and whether the embedding is normalized; without files, what sentence-transformers does then."""
    if not (folder / MODULES).is_file():
        return "mean", False
    import json

    modules = json.loads((folder / MODULES).read_text(encoding="utf-8"))
    kinds = [str(each.get("type", "")).rpartition(".")[2] for each in modules]
    if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"]):
        raise _refused(
            where, f"{MODULES} asks for {', '.join(kinds)}; Transformer, Pooling and Normalize are available"
        )
    pooling = _optional(folder / str(modules[1].get("path", "1_Pooling")) / "config.json")
    asked = [
        name.removeprefix("pooling_mode_")
        for name, on in pooling.items()
        if name.startswith("pooling_mode_") and on is True
    ]
    if isinstance(pooling.get("pooling_mode"), str):
        asked = [pooling["pooling_mode"]]
    names = [POOLING.get(each.removesuffix("_token").removesuffix("_tokens")) for each in asked] or ["mean"]
    if len(names) != 1 or names[0] is None:
        raise _refused(where, f"it pools by {', '.join(asked)}; cls, mean or lasttoken alone are available")
    if pooling.get("include_prompt") is False and (_optional(folder / PROMPTS).get("prompts") or {}):
        raise _refused(where, "its pooling leaves the prompt out (include_prompt: false)")
    return names[0], kinds[2:] == ["Normalize"]


# -- In the child process


def build(job: Job) -> Converted:
    """Fill a model directory for embeddings or reranking: tokenizer, configuration, weights, proof.

    Raises:
        ExportError: The tokenizer or the model cannot be converted, or the result differs from its source.
        SourceError: The checkpoint is not what its configuration says, or cannot be used by GenAI.
    """
    name, config = job.checkpoint.name, read_json(job.checkpoint / "config.json")
    facts = read(job.checkpoint, job.task, config, name)
    with disk_full_as_error(job.work):
        emit(Step("tokenizer"))
        side = "left" if facts.pooling == "last_token" else "right"
        tokenizer = write_tokenizer(
            job.checkpoint, job.output, trust_remote_code=job.trust_remote_code, padding_side=side
        )
        source_tokenizer.check_rows(tokenizer, int(config["vocab_size"]), name)
        emit(Step("reading"))
        kind = "AutoModel" if job.task == EMBEDDING else "AutoModelForSequenceClassification"
        loaded = tensors.load(
            job.checkpoint,
            "float32",
            trust_remote_code=job.trust_remote_code,
            kind=kind,
            unused=UNUSED if job.task == EMBEDDING else None,
            optional=OPTIONAL if job.task == EMBEDDING else None,
        )
        model = loaded.model
        facts = _with_parameters(facts, sum(each.numel() for each in model.parameters()))
        emit(Step("converting"))
        _write_ir(model, job)
        checks: dict[str, Any] = {}
        expected: Any = None
        if job.prove:
            emit(Step("proving"))
            expected = _expected(model, tokenizer, facts)
            # GenAI wants all files in one folder.
            for each in (*(name for name in IR_FILES if "tokenizer" in name), "config.json"):
                shutil.copyfile(job.output / each, job.work / each)
            exact = load(job.work, facts, properties=EXACT)
            checks["tokenizer"] = _compare_tokens(tokenizer, exact, job.work, facts)
            checks["encoder"] = _judge(_measured(exact, facts), expected, facts)
            del exact
        del model, loaded
    gc.collect()
    with disk_full_as_error(job.output):
        compression = _compress(job)
    for file in FILES:
        if (job.checkpoint / file).is_file():
            (job.output / file).parent.mkdir(exist_ok=True)
            shutil.copyfile(job.checkpoint / file, job.output / file)
    if job.prove:
        emit(Step("verifying"))
        checks["encoder_compression"] = _difference(
            _measured(load(job.output, facts, properties=EXACT), facts), expected
        )
    return Converted(compression, checks, {}, facts)


def _with_parameters(facts: TextEncoder, parameters: int) -> TextEncoder:
    from dataclasses import replace

    return replace(facts, parameters=parameters)


def _write_ir(model: Any, job: Job) -> None:
    from optimum.exporters.openvino import export_from_model
    from optimum.intel.openvino import OVConfig

    with tensors.as_export_error(f"Optimum-Intel cannot export {job.checkpoint.name}", "ir-missing"):
        export_from_model(
            model=model,
            output=job.work,
            task=job.task,
            library_name="transformers",
            ov_config=OVConfig(dtype="fp32"),
        )
    if not (job.work / MODEL_BIN).exists():
        raise ExportError("Optimum-Intel ended without an IR; its messages are in the log", code="ir-missing")
    shutil.move(job.work / "config.json", job.output / "config.json")


def _compress(job: Job) -> dict[str, Any]:
    import openvino

    if job.recipe.bits == 8:
        emit(Step("compressing"))
        return compress_ir(job.ir, job.output, job.recipe, job.output)
    if job.recipe.bits == 16:
        openvino.save_model(openvino.Core().read_model(job.ir), job.output / MODEL_XML, compress_to_fp16=True)
        return {}
    for name in (MODEL_XML, MODEL_BIN):
        shutil.move(job.work / name, job.output / name)
    return {}


# -- Proof


def _texts(facts: TextEncoder) -> list[str]:
    """Texts to compare: what tokenizers disagree about, nothing, and one that most models must cut."""
    return [*TEXTS, "", "The capital of France is Paris. " * (min(facts.max_tokens, PROOF_TOKENS) // 5)]


def _expected(model: Any, tokenizer: Any, facts: TextEncoder) -> NDArray[np.float32]:
    """What transformers makes of the texts, by sentence-transformers' rules: embeddings, or scores in one column."""
    import numpy as np
    import torch

    rows = []
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    for text in _texts(facts):
        given = (text,) if facts.task == EMBEDDING else (QUERY, text)
        inputs = tokenizer(
            *([each] for each in given), truncation=True, max_length=facts.max_tokens, return_tensors="pt"
        )
        with torch.no_grad():
            output = model(**inputs)
            if facts.task == RERANKING:
                logits = output.logits.float()
                row = logits.sigmoid()[0, :1] if logits.shape[1] == 1 else logits.softmax(1)[0, 1:]
            else:
                hidden = output.last_hidden_state[0].float()
                row = {"mean": hidden.mean(0), "cls": hidden[0], "last_token": hidden[-1]}[str(facts.pooling)]
                row = torch.nn.functional.normalize(row, dim=0) if facts.normalize else row
        rows.append(row.numpy())
    return np.stack(rows)


def _measured(loaded: LoadedEncoder, facts: TextEncoder) -> NDArray[np.float32]:
    query = None if facts.task == EMBEDDING else QUERY
    return loaded.compute(loaded.count_checked(_texts(facts), query=query, cut=True), query=query)


def _difference(measured: NDArray[np.float32], expected: NDArray[np.float32]) -> dict[str, Any]:
    """How far vectors, or scores, are from those of the source."""
    import numpy as np

    result: dict[str, Any] = {"texts": len(expected), "max_diff": float(np.abs(measured - expected).max())}
    if expected.shape[1] > 1:
        norms = np.linalg.norm(measured, axis=1) * np.linalg.norm(expected, axis=1)
        result["cosine_min"] = float(((measured * expected).sum(1) / np.maximum(norms, 1e-12)).min())
    return result


def _judge(measured: NDArray[np.float32], expected: NDArray[np.float32], facts: TextEncoder) -> dict[str, Any]:
    """The same, if it is as near as two f32 programs are.

    Raises:
        ExportError: It is not.
    """
    result = _difference(measured, expected)
    if facts.task == RERANKING and not result["max_diff"] <= SCORE_BOUND:
        raise ExportError(
            f"the exported model scores a text {result['max_diff']:.2g} off transformers (bound {SCORE_BOUND:g})",
            code="encoder-differs",
        )
    if facts.task == EMBEDDING and not result["cosine_min"] >= COSINE_BOUND:
        raise ExportError(
            f"an embedding of the exported model has cosine {result['cosine_min']:.6f} with that of transformers "
            f"(bound {COSINE_BOUND:g})",
            code="encoder-differs",
        )
    return result


def _compare_tokens(source: Any, loaded: LoadedEncoder, folder: Path, facts: TextEncoder) -> dict[str, Any]:
    """Compare ids of texts, and of a query with them, with those of transformers.

    Raises:
        ExportError: They differ.
        SourceError: GenAI cannot join query and text for this tokenizer.
    """
    import openvino_genai

    pairs = facts.task == RERANKING
    if pairs and not loaded.takes_pairs:
        raise _refused(folder.name, "its tokenizer has no rule for a query with a text that OpenVINO can read")
    exported = openvino_genai.Tokenizer(str(folder), **({"add_second_input": True} if pairs else {}))
    count = 0
    for text, expected, ids in _encodings(source, exported, pairs):
        if ids != expected:
            at = next(i for i in range(max(len(ids), len(expected))) if ids[i : i + 1] != expected[i : i + 1])
            raise ExportError(
                f"the exported tokenizer differs from the source's at token {at} of {text[:24]!r}: {ids[at : at + 5]} "
                f"where the source gives {expected[at : at + 5]}",
                code="tokenizer-differs",
            )
        count += len(ids)
    proof = of_tokenizer(openvino_genai.Tokenizer(str(folder))).to_dict()
    return {"texts": len(TEXTS), "tokens": count, "equal": True, **proof}


def _encodings(source: Any, exported: Any, pairs: bool) -> Iterator[tuple[str, Sequence[int], Sequence[int]]]:
    for text in (*TEXTS, ""):
        given = (QUERY, text) if pairs else (text,)
        encoded = exported.encode(*([each] for each in given))
        yield text, source(*([each] for each in given))["input_ids"][0], encoded.input_ids.data[0].tolist()
