"""Synthetic checkpoints: the exact geometry of a real model, random weights.

Its speed, memory and disk space are those of the real model; its words are noise. It is marked in `config.json`
(`ov_afm_synthetic`), and the mark follows it into every manifest and model card.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..model_dir.geometry import Geometry
from ..model_dir.outputs import SYNTHETIC_KEY, new_folder
from ..system import console, resources
from ..system.atomic import disk_full_as_error, write_json, write_text
from . import checkpoint

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["GEOMETRIES", "ArceeGeometry", "byte_alphabet", "synth"]

SHARD_BYTES = 2 << 30
# Values made at a time; bounds memory, whatever the geometry.
BLOCK = 1 << 22
DEVIATION = 0.02
ROPE_FACTOR = 20.0
CONTROL_TOKENS = ("<|begin_of_text|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
Tensor = tuple[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class ArceeGeometry(Geometry):
    """Shape of an Arcee model, enough to write a synthetic checkpoint of it.

    Attributes:
        rope_original: Context before YaRN, in tokens.
    """

    rope_original: int = 4096

    @property
    def all_parameters(self) -> int:
        """Number of weights, norms included."""
        return self.parameters(tied=False) + (2 * self.layers + 1) * self.hidden


GEOMETRIES = {
    name: ArceeGeometry("ArceeForCausalLM", *sizes, "relu2", rope_original)
    # hidden, layers, heads, kv_heads, head_dim, intermediate, vocab, max_positions
    for name, sizes, rope_original in (
        ("afm-4.5b", (2560, 36, 20, 4, 128, 18432, 128_256, 65_536), 4_096),
        ("afm-1b", (1536, 24, 12, 4, 128, 9216, 49_152, 65_536), 4_096),
        ("small", (512, 8, 8, 2, 64, 2048, 4_096, 8_192), 512),
        ("tiny", (128, 2, 4, 2, 32, 256, 1_024, 2_560), 128),
    )
}


def synth(
    geometry: str | ArceeGeometry,
    output: str | Path,
    *,
    layers: int | None = None,
    seed: int = 0,
    force: bool = False,
    progress: console.Progress | None = None,
) -> Path:
    """Write a synthetic Arcee checkpoint in bf16.

    Args:
        geometry: Name from `GEOMETRIES`, or a geometry.
        output: New checkpoint folder.
        layers: Number of layers instead of the geometry's.
        seed: Of the random weights; same seed, same bytes.
        force: Replace an older checkpoint of `prune` or `synth`; other folders never.
        progress: Where to draw progress.

    Returns:
        The folder.

    Raises:
        ConfigError: The geometry is unknown, or `output` cannot be written.
        OVAFMError: The disk cannot hold it.
    """
    if isinstance(geometry, str):
        if geometry not in GEOMETRIES:
            raise ConfigError(
                f"geometry {geometry!r} is unknown; choose one of {', '.join(GEOMETRIES)}", code="geometry-unknown"
            )
        geometry = GEOMETRIES[geometry]
    if layers is not None:
        if layers < 1:
            raise ConfigError(f"a model has at least 1 layer, found {layers}", code="layers-out-of-range")
        geometry = replace(geometry, layers=layers)
    target = Path(output)
    size = 2.0 * geometry.all_parameters
    with (
        new_folder(target, force=force) as partial,
        disk_full_as_error(target.absolute().parent),
        progress if progress is not None else console.Progress() as bars,
        bars.step("writing random weights", total=size, unit="B") as advance,
    ):
        resources.check_disk(partial, {"the checkpoint": size})
        _write_weights(partial, geometry, seed, advance)
        _write_texts(partial, geometry)
    return target


def _tensors(shape: ArceeGeometry) -> Iterator[Tensor]:
    hidden = shape.hidden
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    yield "model.embed_tokens.weight", (shape.vocab, hidden)
    for index in range(shape.layers):
        layer = f"model.layers.{index}"
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.self_attn.q_proj.weight", (query, hidden)
        yield f"{layer}.self_attn.k_proj.weight", (key, hidden)
        yield f"{layer}.self_attn.v_proj.weight", (key, hidden)
        yield f"{layer}.self_attn.o_proj.weight", (hidden, query)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
        yield f"{layer}.mlp.up_proj.weight", (shape.intermediate, hidden)
        yield f"{layer}.mlp.down_proj.weight", (hidden, shape.intermediate)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (shape.vocab, hidden)


def _bytes(tensor: Tensor) -> int:
    return 2 * math.prod(tensor[1])


def _shards(tensors: Iterator[Tensor]) -> list[list[Tensor]]:
    shards: list[list[Tensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + _bytes(tensor) > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += _bytes(tensor)
    return shards


def _write_weights(folder: Path, geometry: ArceeGeometry, seed: int, advance: Callable[..., None]) -> None:
    import numpy as np

    random = np.random.default_rng(seed)
    shards = _shards(_tensors(geometry))
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for name, tensors in zip(names, shards, strict=True):
        with (folder / name).open("wb") as stream:
            stream.write(checkpoint.safetensors_header({each: ("BF16", shape) for each, shape in tensors}))
            for tensor in tensors:
                for block in _values(tensor, random):
                    stream.write(block.tobytes())
                    advance(block.nbytes)
    weight_map = {tensor[0]: name for name, tensors in zip(names, shards, strict=True) for tensor in tensors}
    index = {"metadata": {"total_size": 2 * geometry.all_parameters}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)


def _values(tensor: Tensor, random: np.random.Generator) -> Iterator[NDArray[np.uint16]]:
    """The bf16 values of a tensor as bit patterns: ones for norms, a normal distribution elsewhere."""
    import numpy as np

    size = math.prod(tensor[1])
    for start in range(0, size, BLOCK):
        count = min(BLOCK, size - start)
        if len(tensor[1]) == 1:
            values = np.ones(count, dtype=np.float32)
        else:
            values = random.standard_normal(count, dtype=np.float32) * np.float32(DEVIATION)
        # bf16 is the upper half of f32.
        yield (values.view(np.uint32) >> 16).astype(np.uint16)


def _write_texts(folder: Path, shape: ArceeGeometry) -> None:
    write_json(folder / "config.json", _config(shape))
    write_json(folder / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 2})
    write_json(folder / "tokenizer.json", _tokenizer(shape.vocab))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": CONTROL_TOKENS[0],
            "eos_token": CONTROL_TOKENS[2],
            "pad_token": CONTROL_TOKENS[2],
            "clean_up_tokenization_spaces": False,
        },
    )
    write_text(folder / "chat_template.jinja", CHAT_TEMPLATE)
    write_text(
        folder / "README.md",
        "---\nlicense: apache-2.0\n---\n\nA synthetic checkpoint of random weights, written by `ov-afm synth` "
        "to measure speed and memory. It speaks no language.\n",
    )


def _config(shape: ArceeGeometry) -> dict[str, Any]:
    return {
        "architectures": ["ArceeForCausalLM"],
        "model_type": "arcee",
        SYNTHETIC_KEY: True,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.intermediate,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.max_positions,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": ROPE_FACTOR,
            "original_max_position_embeddings": shape.rope_original,
        },
        "hidden_act": "relu2",
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "dtype": "bfloat16",
    }


def _tokenizer(vocab: int) -> dict[str, Any]:
    """A byte-level tokenizer with `vocab` entries: bytes are encoded, made-up words fill the rest."""
    tokens = [*CONTROL_TOKENS, *byte_alphabet()]
    letters = "abcdefghijklmnopqrstuvwxyz"
    for number in range(vocab - len(tokens)):
        word = ""
        for _ in range(4):
            number, letter = divmod(number, len(letters))
            word += letters[letter]
        # The tilde keeps them apart from words of real text, which some tokenizers look up whole.
        tokens.append(f"Ġ~{word}")
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "added_tokens": [{"id": index, "content": text, **flags} for index, text in enumerate(CONTROL_TOKENS)],
        "pre_tokenizer": level,
        "decoder": level,
        "model": {"type": "BPE", "vocab": {text: index for index, text in enumerate(tokens)}, "merges": []},
    }


def byte_alphabet() -> list[str]:
    """The 256 characters by which byte-level BPE writes bytes (GPT-2's `bytes_to_unicode`)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = itertools.count(256)
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
