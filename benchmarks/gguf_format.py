"""How a decoder is described in a GGUF, to write one and to tell whether one is of the same model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matrices import Matrix, bits_per_weight

from ov_afm.errors import ConfigError
from ov_afm.model_dir.geometry import Geometry

ARCHITECTURES = {"ArceeForCausalLM": "ARCEE", "LlamaForCausalLM": "LLAMA"}
# A GGUF's formats have blocks of 32 where an IR has groups of 128 or rows: 4.5 instead of 4.1 bits, 8.5 instead of 8.0.
# Q4_K_M has 4.9. The next formats in either direction are further away.
TOLERANCE = 0.15


def architecture(geometry: Geometry) -> Any:
    """What the gguf package calls a model's architecture.

    Raises:
        ConfigError: It is none that can be written here.
    """
    import gguf

    if geometry.architecture not in ARCHITECTURES:
        raise ConfigError(f"no GGUF of a {geometry.architecture} can be written; known: {', '.join(ARCHITECTURES)}")
    return gguf.MODEL_ARCH[ARCHITECTURES[geometry.architecture]]


def name_in_gguf(geometry: Geometry) -> Callable[[str], str]:
    """A function from a tensor's name in transformers to its name in a GGUF."""
    import gguf

    names = gguf.get_tensor_name_map(architecture(geometry), geometry.layers)

    def name(tensor: str) -> str:
        known: str | None = names.get_name(tensor, try_suffixes=(".weight", ".bias"))
        if known is None:
            raise ConfigError(f"{tensor} has no place in a GGUF of a {geometry.architecture}")
        return known

    return name


def new_writer(path: Path, geometry: Geometry, config: Mapping[str, Any]) -> Any:
    """A writer that has described the model and has no tensors and no tokenizer yet.

    Args:
        path: New file.
        geometry: The model's shape.
        config: Its `config.json`. Scaling of positions is left out: it changes no speed.
    """
    import gguf

    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture(geometry)])
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    writer.add_context_length(geometry.max_positions)
    writer.add_embedding_length(geometry.hidden)
    writer.add_block_count(geometry.layers)
    writer.add_feed_forward_length(geometry.intermediate)
    writer.add_head_count(geometry.heads)
    writer.add_head_count_kv(geometry.kv_heads)
    writer.add_key_length(geometry.head_dim)
    writer.add_value_length(geometry.head_dim)
    writer.add_rope_dimension_count(geometry.head_dim)
    writer.add_rope_freq_base(float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0))
    writer.add_layer_norm_rms_eps(float(config.get("rms_norm_eps") or 1e-5))
    writer.add_vocab_size(geometry.vocab)
    return writer


def read_peer(path: Path, geometry: Geometry, matrices: Sequence[Matrix]) -> list[Matrix]:
    """The matrices of a GGUF that is to be compared with a model.

    Args:
        path: The GGUF.
        geometry: The model's shape.
        matrices: The model's matrices.

    Returns:
        The same matrices as the GGUF stores them.

    Raises:
        ConfigError: It is no GGUF, or one of another geometry or of far more or fewer bits a weight.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        arch = reader.fields["general.architecture"].contents()
        heads = [reader.fields[f"{arch}.attention.{name}"].contents() for name in ("head_count", "head_count_kv")]
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise ConfigError(f"{path} cannot be read as the GGUF of a decoder: {' '.join(str(error).split())}") from error
    name = name_in_gguf(geometry)
    named = {name(each.name): each for each in matrices}
    expected = {key: each.shape for key, each in named.items()}
    shapes = {key: tuple(int(n) for n in reversed(tensor.shape)) for key, tensor in tensors.items()}
    shapes = {key: shape for key, shape in shapes.items() if len(shape) > 1}
    for key in sorted(shapes.keys() | expected.keys()):
        if shapes.get(key) != expected.get(key):
            raise _differs(path, key, _dimensions(shapes.get(key)), _dimensions(expected.get(key)))
    if heads != [geometry.heads, geometry.kv_heads]:
        raise _differs(path, "heads", "{}, {} of them KV".format(*heads), f"{geometry.heads}, {geometry.kv_heads}")
    stored = []
    for key, each in named.items():
        size = int(tensors[key].n_bytes)
        stored.append(Matrix(each.name, each.shape, 8 * size // each.size, tensors[key].tensor_type.name, size))
    bits, wanted = bits_per_weight(stored), bits_per_weight(matrices)
    if abs(bits - wanted) > TOLERANCE * wanted:
        raise _differs(path, "weights", f"of {bits:.2f} bits", f"{wanted:.2f} bits")
    return stored


def _dimensions(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else " x ".join(map(str, shape))


def _differs(path: Path, what: str, found: str, expected: str) -> ConfigError:
    return ConfigError(
        f"{path} is no peer of the model: {what} {found}, the model's {expected}; "
        "give another --gguf, or the name of a new file, which is then written"
    )
