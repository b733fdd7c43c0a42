"""The part of an export that needs torch: a checkpoint becomes an IR, which is compressed, each with its proof.

`build` runs in a child process, because converters print, leak memory, and are killed by the operating system when
memory runs out.
"""

from __future__ import annotations

import copy
import gc
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ExportError
from ..model_dir import tokenizer_files
from ..model_dir.manifest import MODEL_BIN, MODEL_XML
from ..model_dir.model_directory import read_config
from ..model_dir.text_encoder import TEXT_GENERATION, TextEncoder
from ..presets import Recipe
from ..quantization.compress_weights import compress_ir
from ..quantization.cost import text_ids
from ..runtime import chat_template, lora
from ..system.atomic import disk_full_as_error, write_json, write_text
from ..system.child_process import Progress, Step, emit
from . import generation_config, merge_adapters, source_tokenizer, verify
from .tensors import as_export_error, load

__all__ = ["STEPS", "Converted", "Job", "build"]

# What `build` does, and what people read of it.
STEPS = {
    "tokenizer": "converting the tokenizer",
    "merging": "comparing the merged adapters with PEFT",
    "reading": "reading the checkpoint",
    "converting": "converting the model",
    "proving": "comparing with the source",
    "compressing": "compressing weights",
    "verifying": "verifying the result",
}
DTYPES = {"fp32": "float32", "fp16": "float16"}

# Copied byte for byte. `tokenizer.model` is left out: nothing reads it in a model directory.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
# Shape of the slice that is compared when the whole model does not fit in memory. One layer is enough, because the
# layers of a decoder are alike and all weights are compared anyway; more costs minutes at 4,160 tokens.
SLICE = {"num_hidden_layers": 1, "intermediate_size": 4096, "vocab_size": 4096}


@dataclass(frozen=True, slots=True)
class Job:
    """What to convert, and how.

    Attributes:
        checkpoint: Hugging Face checkpoint folder.
        output: The future model directory.
        work: Folder for the uncompressed IR and the reference logits.
        recipe: What to do with the weights.
        proof_bytes: Memory that the comparison with transformers may take.
        prove: Compare with the source.
        trust_remote_code: Let transformers run the checkpoint's own code.
        adapters: LoRA adapters to merge; the source is then the merged model.
        task: What the model is for; see `text_encoders` for those that write no text.
    """

    checkpoint: Path
    output: Path
    work: Path
    recipe: Recipe
    proof_bytes: int = 0
    prove: bool = True
    trust_remote_code: bool = False
    adapters: tuple[lora.Adapter, ...] = ()
    task: str = TEXT_GENERATION

    @property
    def ir(self) -> Path:
        """The uncompressed IR."""
        return self.work / MODEL_XML

    @property
    def reference(self) -> Path:
        """The source's logits, which are there where the whole source fitted in memory."""
        return self.work / "reference.npz"


@dataclass(frozen=True, slots=True)
class Converted:
    """What a conversion did.

    Attributes:
        compression: What compression did, for the manifest's recipe.
        checks: What was proved; empty where no proof was asked for.
        generation: What `generation_config.carry` did.
        text_encoder: What a model that writes no text does with its vectors.
    """

    compression: dict[str, Any]
    checks: dict[str, Any]
    generation: dict[str, Any]
    text_encoder: TextEncoder | None = None


def build(job: Job) -> Converted:
    """Fill a model directory from a checkpoint: tokenizer, configuration, weights.

    Raises:
        ExportError: The tokenizer or the model cannot be converted, or the result differs from its source.
        CompressionError: The recipe does not fit the model.
        SourceError: An adapter does not fit the model.
    """
    with disk_full_as_error(job.work):
        emit(Step("tokenizer"))
        tokenizer = write_tokenizer(job.checkpoint, job.output, trust_remote_code=job.trust_remote_code)
        source_tokenizer.check_rows(tokenizer, int(read_config(job.checkpoint)["vocab_size"]), job.checkpoint.name)
        checks: dict[str, Any] = {}
        if job.prove:
            # Before the work of minutes: tokenizer and template are final.
            checks = verify.tokenizer_equal(job.checkpoint, job.output, trust_remote_code=job.trust_remote_code)
        if job.prove and job.adapters:
            emit(Step("merging"))
            checks["adapters"] = _compare_merge(job)
        emit(Step("reading"))
        dtype = DTYPES.get(job.recipe.weight_format)
        loaded = load(job.checkpoint, dtype, trust_remote_code=job.trust_remote_code)
        model = loaded.model
        merge_adapters.merge(model, job.adapters)
        emit(Step("converting"))
        _convert(model, job)
        generation = generation_config.carry(job.checkpoint, job.output)
        if job.prove:
            emit(Step("proving"))
            checks |= {"weights": verify.weights_equal(model, job.ir), "export_parity": prove(model, job)}
            if loaded.cast:
                checks["weights"]["cast"] = loaded.cast
        notes = loaded.notes
        del model, loaded
    gc.collect()
    with disk_full_as_error(job.output):
        compression = _compress(job)
    if notes:
        compression["notes"] = [*notes, *compression.get("notes", [])]
    if job.prove:
        emit(Step("verifying"))
        checks["compression"] = verify.compression_cost(job.output / MODEL_XML, job.reference)
    return Converted(compression, checks, generation)


def _convert(model: Any, job: Job) -> None:
    expected = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    with _report_growth(job.work / MODEL_BIN, expected):
        _write_ir(model, job.work)
    shutil.move(job.work / "config.json", job.output / "config.json")


def _compress(job: Job) -> dict[str, Any]:
    if job.recipe.bits <= 8 or job.recipe.equalise != "none":
        emit(Step("compressing"))
        return compress_ir(job.ir, job.output, job.recipe, job.output)
    for name in (MODEL_XML, MODEL_BIN):
        shutil.move(job.work / name, job.output / name)
    return {}


def _compare_merge(job: Job) -> dict[str, Any]:
    """The merged model against PEFT, if it fits in memory at f32."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(job.checkpoint, trust_remote_code=job.trust_remote_code)
    # One model at a time, where the proof of the IR has two; a short prompt.
    need = verify.proof_memory(config, 2 * merge_adapters.PROMPT_TOKENS) / 2
    if need > job.proof_bytes:
        return {"skipped": f"it needs {need / 1e9:.1f} GB of memory, {job.proof_bytes / 1e9:.1f} GB are free"}

    def load_base() -> Any:
        return load(job.checkpoint, "float32", trust_remote_code=job.trust_remote_code).model

    return merge_adapters.compare(load_base, job.adapters)


def write_tokenizer(
    checkpoint: Path, output: Path, *, trust_remote_code: bool = False, padding_side: str = "left"
) -> Any:
    """Convert the tokenizer of a checkpoint, and copy its own files and its chat template.

    Args:
        checkpoint: Hugging Face checkpoint folder.
        output: The future model directory.
        trust_remote_code: Let transformers run the checkpoint's own code.
        padding_side: Where a text is filled up to the length of others. `left` for decoders: the last position is then
            the prompt's last token.

    Returns:
        The tokenizer in transformers.

    Raises:
        ExportError: It cannot be read or converted.
        SourceError: It cannot be expressed in `tokenizer.json`.
    """
    import openvino
    from openvino_tokenizers import convert_tokenizer

    with as_export_error(f"the tokenizer of {checkpoint.name} cannot be read", "tokenizer-not-converted"):
        tokenizer = source_tokenizer.load(checkpoint, trust_remote_code=trust_remote_code)
    with as_export_error(f"the tokenizer of {checkpoint.name} cannot be converted", "tokenizer-not-converted"):
        tokenizer.padding_side = tokenizer.truncation_side = padding_side
        templates = _templates(checkpoint, tokenizer)
        # The tokenizer's IR keeps one template, which GenAI takes before any file.
        tokenizer.chat_template = templates.get("default")
        models = convert_tokenizer(convertible(tokenizer), with_detokenizer=True)
    for model, name in zip(models, ("openvino_tokenizer.xml", "openvino_detokenizer.xml"), strict=True):
        openvino.save_model(model, output / name)
    for name in TOKENIZER_FILES:
        if (checkpoint / name).exists():
            shutil.copyfile(checkpoint / name, output / name)
    if not (output / "tokenizer.json").exists():
        tokenizer.save_pretrained(output)
    _write_templates(checkpoint, output, templates)
    if tokenizer_files.special_tokens(output) != tokenizer.special_tokens_map:
        # Some tokenizer classes have special tokens that no file names.
        write_json(output / "special_tokens_map.json", tokenizer.special_tokens_map)
    return tokenizer


def _templates(checkpoint: Path, tokenizer: Any) -> dict[str, str]:
    """The chat templates of a source by name, with a `default` if there are any."""
    templates = tokenizer_files.chat_templates(checkpoint)
    if not templates and isinstance(tokenizer.chat_template, str):
        templates = {"default": tokenizer.chat_template}
    if not templates:
        return {}
    name, _ = chat_template.choose(templates, checkpoint.name)
    return {**templates, "default": templates[name]}


def _write_templates(checkpoint: Path, output: Path, templates: dict[str, str]) -> None:
    """Write templates where transformers and GenAI look for them; a file of the source is copied byte for byte."""
    for name, text in templates.items():
        folder, stem = tokenizer_files.ADDITIONAL_TEMPLATES, f"{name}.jinja"
        place = Path(tokenizer_files.TEMPLATE_FILE if name == "default" else f"{folder}/{stem}")
        (output / place).parent.mkdir(exist_ok=True)
        if (checkpoint / place).is_file():
            shutil.copyfile(checkpoint / place, output / place)
        else:
            write_text(output / place, text)


def convertible(tokenizer: Any) -> Any:
    """A tokenizer that openvino_tokenizers converts correctly; the same one where it does that anyway.

    openvino_tokenizers joins a sequence of splits into alternatives. For a tokenizer that splits off digits before it
    applies the GPT-2 rule (as SmolLM2 does) that leaves two spaces before a digit in one piece. A single expression
    that splits in the same way replaces the sequence.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"] or {}
    steps = [
        (step["type"], step.get("individual_digits"), step.get("use_regex")) for step in state.get("pretokenizers", ())
    ]
    if steps != [("Digits", True, None), ("ByteLevel", None, True)]:
        return tokenizer
    from .gguf.tokenizer import pre_tokenizer

    equivalent = copy.deepcopy(tokenizer)
    equivalent.backend_tokenizer.pre_tokenizer = pre_tokenizer("smollm")
    return equivalent


def _write_ir(model: Any, folder: Path) -> None:
    import torch
    from optimum.exporters.openvino import export_from_model
    from optimum.intel.openvino import OVConfig

    # Without an OVConfig the exporter would choose int8 above 1 B parameters. "fp32" keeps constants in their own type.
    export_from_model(
        model=model,
        output=folder,
        task="text-generation-with-past",
        ov_config=OVConfig(dtype="fp32"),
        stateful=True,
        patch_16bit_model=model.dtype in (torch.float16, torch.bfloat16),
    )
    if not (folder / MODEL_BIN).exists():
        raise ExportError("Optimum-Intel ended without an IR; its messages are in the log", code="ir-missing")


def prove(model: Any, job: Job) -> dict[str, Any]:
    """Compare logits of the IR with those of transformers: of the whole model if both fit in memory, else of a slice.

    Returns:
        The check `export_parity`, with what was left out and why.

    Raises:
        ExportError: The logits differ.
    """
    tokens = verify.proof_length(model.config)
    if job.proof_bytes >= verify.proof_memory(model.config, tokens):
        ids = text_ids(source_tokenizer.load(job.checkpoint, trust_remote_code=job.trust_remote_code))
        model = model.float()
        result = verify.logits_equal(model, job.ir, verify.prompt(model.config, tokens))
        verify.save_reference(model, ids, job.reference)
        return {**result, "layers": "all"}
    whole = {name: getattr(model.config, name) for name in SLICE}
    shape = {name: min(size, whole[name]) for name, size in SLICE.items()}
    need = verify.proof_memory(model.config, tokens, **shape)
    if need > job.proof_bytes:
        return {"skipped": f"one layer needs {need / 1e9:.1f} GB of memory, {job.proof_bytes / 1e9:.1f} GB are free"}
    sliced = slice_model(model, shape)
    folder = job.work / "slice"
    try:
        _write_ir(sliced, folder)
        result = verify.logits_equal(sliced.float(), folder / MODEL_XML, verify.prompt(sliced.config, tokens))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    parts = [f"{name} {kept} of {whole[name]}" for name, kept in shape.items() if kept < whole[name]]
    return {**result, "layers": shape["num_hidden_layers"], "slice": shape, "skipped": f"memory: {', '.join(parts)}"}


def slice_model(model: Any, shape: dict[str, int]) -> Any:
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
