"""What llama.cpp's quantization costs, on the scale of `benchmarks/recipes.py`.

    python benchmarks/gguf_recipes.py CHECKPOINT --work-dir DIR --kinds Q4_0 Q4_K_M [--llama-python PYTHON]

The checkpoint is written as an F32 GGUF, llama.cpp quantizes it (llama-cpp-python, in another environment if need be),
and what it stored is read back as f32 and evaluated in transformers: weights alone, without llama.cpp's rounding of
activations. No importance matrix is used. Rows of q and k are not permuted, as llama.cpp's converter would: blocks lie
along the rows, so that it changes nothing here.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gguf_format import name_in_gguf, new_writer
from program import last_words, program

from ov_afm.errors import OVAFMError, SourceError
from ov_afm.evaluation import scoring
from ov_afm.evaluation.divergence import summarize
from ov_afm.evaluation.text import load_text
from ov_afm.model_dir.geometry import Geometry
from ov_afm.model_dir.model_directory import ModelDirectory, read_config
from ov_afm.system import console
from ov_afm.system.atomic import replacing

FILE_TYPES = {"Q4_0": 2, "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_M": 17, "Q8_0": 7}
QUANTIZE = """
import ctypes, sys, llama_cpp
params = llama_cpp.llama_model_quantize_default_params()
params.ftype, params.nthread = int(sys.argv[3]), 2
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(params)))
"""


def write_gguf(checkpoint: Path, path: Path, config: dict[str, Any]) -> None:
    """A checkpoint as an F32 GGUF without a tokenizer."""
    import torch
    from safetensors import safe_open

    geometry = Geometry.from_config(config)
    name_of = name_in_gguf(geometry)
    with replacing(path) as temporary:
        writer = new_writer(temporary, geometry, config)
        writer.add_tokenizer_model("no_vocab")
        for file in sorted(checkpoint.glob("*.safetensors")):
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (no mapping)
                    writer.add_tensor(name_of(name), tensors.get_tensor(name).to(torch.float32).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def read_back(path: Path, checkpoint: Path, folder: Path, config: dict[str, Any]) -> tuple[float, dict[str, int]]:
    """What a GGUF holds, as an f32 checkpoint; returns bits for each weight, and matrices by type."""
    import gguf
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    tensors_of_gguf = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    name_of = name_in_gguf(Geometry.from_config(config))
    weights, kinds, stored, count = {}, dict[str, int](), 0, 0
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                tensor = tensors_of_gguf[name_of(name)]
                values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
                weights[name] = torch.from_numpy(values.reshape(tensors.get_slice(name).get_shape()).copy())
                if weights[name].ndim > 1:
                    kinds[tensor.tensor_type.name] = kinds.get(tensor.tensor_type.name, 0) + 1
                    stored, count = stored + int(tensor.n_bytes), count + weights[name].numel()
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return 8 * stored / count, kinds


@program
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--kinds", nargs="+", choices=list(FILE_TYPES), default=["Q4_0", "Q4_K_M"])
    parser.add_argument("--llama-python", default=sys.executable, help="a Python that has llama-cpp-python")
    parser.add_argument("--reference", type=Path, help="fp32 model directory instead of the checkpoint")
    parser.add_argument("--text", type=Path)
    args = parser.parse_args()
    config = read_config(args.checkpoint)
    if not any(args.checkpoint.glob("*.safetensors")):
        raise SourceError(f"{args.checkpoint} has no *.safetensors; a checkpoint is needed")
    if args.reference is not None:
        ModelDirectory.open(args.reference)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    whole = args.work_dir / "f32.gguf"
    if not whole.exists():
        write_gguf(args.checkpoint, whole, config)
    reference = args.reference if args.reference is not None else args.checkpoint
    with console.Progress() as bars:
        for kind in args.kinds:
            packed, folder = args.work_dir / f"{kind}.gguf", args.work_dir / kind
            if not packed.exists():
                command = [args.llama_python, "-c", QUANTIZE, whole, packed, str(FILE_TYPES[kind])]
                done = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace")
                if done.returncode:
                    packed.unlink(missing_ok=True)
                    raise OVAFMError(f"llama.cpp could not quantize to {kind}: {last_words(done.stderr)}")
            bits, kinds = read_back(packed, args.checkpoint, folder, config)
            blocks = scoring.tokens_of(folder, load_text(args.text), reference)
            known = scoring.prepare_reference(reference, blocks, bars)
            figures = summarize(scoring.score(folder, blocks, known, bars)[0])
            print(json.dumps({"name": kind, "bits_per_weight": bits, "types": kinds} | asdict(figures)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
