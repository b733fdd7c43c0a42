"""The part of an export that needs torch: checkpoint → IR → compressed IR, with the proof of each.

`build` runs in a child process (`supervise`), because converters print, leak and are killed by the
kernel when memory runs out. Arguments and results are JSON values.
"""

from __future__ import annotations

import copy
import gc
import json
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..compress import compress_ir
from ..errors import ExportError
from ..presets import Recipe
from ..runtime import lora
from ..system.atomic import disk_full_as_error
from ..system.child_process import emit
from . import verify
from .gguf.tokenizer import PRE_TOKENIZERS

__all__ = ["build"]

DTYPES = {"fp32": "float32", "fp16": "float16"}

# Copied as they are: what a tokenizer is, byte for byte. `tokenizer.model` stays behind: nothing reads it here.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
# Rows of embedding and head that the sliced proof keeps; enough for a varied prompt, small in memory.
SLICE_VOCAB = 4096
# Layers of the sliced proof, and neurons of its MLP: what repeats in a decoder is alike, and the weights of all
# are compared anyway. More of either costs minutes at 4,160 tokens.
SLICE_LAYERS = 1
SLICE_INTERMEDIATE = 4096


def build(
    checkpoint: str,
    bundle: str,
    work: str,
    *,
    recipe: dict[str, Any],
    proof_bytes: int,
    prove: bool,
    trust_remote_code: bool,
    adapters: Sequence[tuple[str, float]] = (),
) -> dict[str, Any]:
    """Fill a model directory from a checkpoint: tokenizer, configuration, weights.

    Args:
        checkpoint: Hugging Face checkpoint folder.
        bundle: The model directory to be.
        work: Folder for the uncompressed IR and the reference logits.
        recipe: `presets.Recipe` as a dict.
        proof_bytes: Memory that comparing with transformers may take.
        prove: Compare with the source.
        trust_remote_code: Let transformers run the checkpoint's own code.
        adapters: File and weight of each LoRA adapter to merge; the source is then the merged model.

    Returns:
        `recipe`: what compression did; `checks`: what was proved, empty without `prove`.

    Raises:
        ExportError: The tokenizer or the model cannot be converted, or the result differs from its source.
        CompressionError: The recipe does not fit the model.
        SourceError: An adapter does not fit the model.
    """
    settings = Recipe.from_dict(recipe)
    source, out, scratch = Path(checkpoint), Path(bundle), Path(work)
    with disk_full_as_error(scratch):
        emit(Step("tokenizer"))
        _write_tokenizer(source, out, trust_remote_code)
        emit(Step("reading"))
        model = _load(source, DTYPES.get(settings.weight_format, "auto"), trust_remote_code)
        lora.merge(model, [lora.read(path, weight) for path, weight in adapters])
        checks = _convert(model, source, out, scratch, prove, proof_bytes)
        del model
    gc.collect()
    ir = scratch / "openvino_model.xml"
    summary: dict[str, Any] = {}
    with disk_full_as_error(out):
        if settings.bits <= 8 or settings.equalise != "none":
            emit(Step("compressing"))
            summary = compress_ir(ir, out, settings, out)
        else:
            for path in (ir, ir.with_suffix(".bin")):
                shutil.move(path, out / path.name)
    if prove:
        emit(Step("verifying"))
        reference = scratch / "reference.npz"
        checks |= verify.measure(source, out, reference if reference.exists() else None, trust_remote_code)
    return {"recipe": summary, "checks": checks}


def _convert(model: Any, source: Path, out: Path, work: Path, prove: bool, proof_bytes: int) -> dict[str, Any]:
    expected = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    emit(Step("converting"))
    with _report_growth(work / "openvino_model.bin", expected):
        _write_ir(model, work)
    for name in ("config.json", "generation_config.json"):
        if (work / name).exists():
            shutil.move(work / name, out / name)
    if not prove:
        return {}
    emit(Step("proving"))
    return {
        "weights": verify.weights_equal(model, work / "openvino_model.xml"),
        "export_parity": _prove(model, source, work, proof_bytes),
    }


def _write_tokenizer(source: Path, out: Path, trust_remote_code: bool) -> None:
    import openvino
    from openvino_tokenizers import convert_tokenizer
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        # Decoder-only models are padded on the left, so that the last position is the prompt's last token.
        tokenizer.padding_side = tokenizer.truncation_side = "left"
        models = convert_tokenizer(_convertible(tokenizer), with_detokenizer=True)
    except Exception as error:
        raise ExportError(
            f"the tokenizer of {source.name} cannot be converted: {type(error).__name__}: {error}"
        ) from error
    for model, name in zip(models, ("openvino_tokenizer.xml", "openvino_detokenizer.xml"), strict=True):
        openvino.save_model(model, out / name)
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, out / name)
    if not (out / "tokenizer.json").exists():
        tokenizer.save_pretrained(out)
    template = tokenizer.chat_template
    if isinstance(template, str) and not (out / "chat_template.jinja").exists():
        (out / "chat_template.jinja").write_text(template, encoding="utf-8", newline="")


def _convertible(tokenizer: Any) -> Any:
    """A tokenizer that openvino_tokenizers converts rightly; the same one where it does anyway.

    It joins a sequence of splits into alternatives, so digits cut out before the GPT-2 rule (SmolLM2 and its
    kin) leave two spaces before a digit in one piece. One expression that cuts alike takes their place.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"] or {}
    steps = [
        (step["type"], step.get("individual_digits"), step.get("use_regex")) for step in state.get("pretokenizers", ())
    ]
    if steps != [("Digits", True, None), ("ByteLevel", None, True)]:
        return tokenizer
    from tokenizers import Regex, pre_tokenizers

    equivalent = copy.deepcopy(tokenizer)
    equivalent.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENIZERS["smollm"]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return equivalent


def _load(source: Path, dtype: str, trust_remote_code: bool) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            low_cpu_mem_usage=True,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:
        raise ExportError(f"transformers cannot read {source.name}: {type(error).__name__}: {error}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise ExportError(
            f"{source.name} lacks {len(missing)} weights, the first is {missing[0]}; fetch the checkpoint again"
        )
    return model.eval()


def _write_ir(model: Any, folder: Path) -> None:
    import torch
    from optimum.exporters.openvino import export_from_model
    from optimum.intel.openvino import OVConfig

    # An OVConfig without quantization keeps the exporter from choosing int8 by itself above 1 B parameters;
    # "fp32" means here: store constants in the type that they have.
    export_from_model(
        model=model,
        output=folder,
        task="text-generation-with-past",
        ov_config=OVConfig(dtype="fp32"),
        stateful=True,
        patch_16bit_model=model.dtype in (torch.float16, torch.bfloat16),
    )
    if not (folder / "openvino_model.bin").exists():
        raise ExportError("Optimum-Intel ended without an IR; its messages are in the log")


def _prove(model: Any, source: Path, work: Path, proof_bytes: int) -> dict[str, Any]:
    """Logits of the IR against transformers: of the whole model if both fit in memory, else of a slice."""
    from transformers import AutoTokenizer

    tokens = verify.proof_length(model.config)
    if proof_bytes >= verify.proof_memory(model.config, tokens):
        text_ids = verify.token_ids(AutoTokenizer.from_pretrained(source), verify.TEXT)[: verify.TEXT_TOKENS]
        model = model.float()
        result = verify.logits_equal(model, work / "openvino_model.xml", verify.prompt(model.config, tokens))
        verify.save_reference(model, text_ids, work / "reference.npz")
        return {**result, "layers": "all"}
    shape = {
        "num_hidden_layers": min(SLICE_LAYERS, model.config.num_hidden_layers),
        "intermediate_size": min(SLICE_INTERMEDIATE, model.config.intermediate_size),
        "vocab_size": min(SLICE_VOCAB, model.config.vocab_size),
    }
    need = verify.proof_memory(model.config, tokens, **shape)
    if need > proof_bytes:
        return {"skipped": f"one layer needs {need / 1e9:.1f} GB of memory, {proof_bytes / 1e9:.1f} GB are free"}
    sliced = _slice(model, shape)
    folder = work / "slice"
    try:
        _write_ir(sliced, folder)
        result = verify.logits_equal(
            sliced.float(), folder / "openvino_model.xml", verify.prompt(sliced.config, tokens)
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    whole = {name: getattr(model.config, name) for name in shape}
    parts = [f"{name} {kept} of {whole[name]}" for name, kept in shape.items() if kept < whole[name]]
    return {**result, "layers": shape["num_hidden_layers"], "slice": shape, "skipped": f"memory: {', '.join(parts)}"}


def _slice(model: Any, shape: dict[str, int]) -> Any:
    """A smaller model that has the first rows and columns of the source's own weights."""
    config = copy.deepcopy(model.config)
    for name, value in shape.items():
        setattr(config, name, value)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    weights = model.state_dict()
    sliced = type(model)._from_config(config, dtype=model.dtype)
    corner = {name: weights[name][tuple(map(slice, value.shape))] for name, value in sliced.state_dict().items()}
    sliced.load_state_dict(corner)
    return sliced.eval()


@contextmanager
def _report_growth(path: Path, expected: int) -> Iterator[None]:
    """Emit the size of a file while it is written, twice a second."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.5):
            if path.exists():
                emit(Progress(path.stat().st_size, expected))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
