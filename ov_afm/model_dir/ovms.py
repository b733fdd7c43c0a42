"""A model directory in a repository of OpenVINO Model Server.

A repository is a folder with `config.json`, which names what is served, and a folder for each model: the files of the
model directory beside `graph.pbtxt`. The files are hard links where the disk allows it, so they take no space twice.
The graph's fields are those of Model Server's `llm_calculator.proto`.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..system.atomic import write_json
from ..system.json_text import parse
from . import manifest
from .model_directory import ModelDirectory
from .outputs import new_folder

__all__ = ["CONFIG", "add", "read_config"]

GRAPH = "graph.pbtxt"
CONFIG = "config.json"
# What the server's continuous batching may hold for all requests together. AFM-4.5B's takes 39 kB a token.
CACHE_GB = 2
CONFIG_LISTS = ("model_config_list", "mediapipe_config_list")


def add(model_dir: Path, repository: Path, *, device: str = "CPU", replace: bool = False) -> Path:
    """Add a model to a repository, which is created if necessary. What else it serves stays.

    Args:
        model_dir: A finished model directory; its name becomes the model's.
        repository: Folder of the repository.
        device: Device for the server to use.
        replace: Put it in the place of a model of this name.

    Returns:
        The model's folder in the repository.

    Raises:
        ConfigError: The repository's configuration is another program's, or it has a different model of this name.
        SourceError: The model directory is damaged.
    """
    name = ModelDirectory.open(model_dir, packed=False).name
    graph = _graph(device)
    config = read_config(repository)
    target = repository / name
    if target.exists() and target.samefile(model_dir):
        raise ConfigError(
            f"{model_dir} lies in {repository} itself and would be replaced by its copy; "
            "choose another folder for --ovms",
            code="ovms-holds-model",
        )
    if not _same(model_dir, target, graph):
        with new_folder(target, force=replace, inputs=[model_dir]) as partial:
            for path in model_dir.iterdir():
                # A folder holds the model for the kernels, which other programs cannot run.
                if path.is_file():
                    try:
                        os.link(path, partial / path.name)
                    except OSError:  # another disk, or one without links
                        shutil.copyfile(path, partial / path.name)
            (partial / GRAPH).write_text(graph, encoding="utf-8")
    served = config.setdefault("mediapipe_config_list", [])
    config.setdefault("model_config_list", [])
    if all(entry.get("name") != name for entry in served):
        served.append({"name": name, "base_path": name})
    write_json(repository / CONFIG, config)
    return target


def _same(model_dir: Path, target: Path, graph: str) -> bool:
    """Whether the repository holds this very model with this graph already."""
    source, existing = model_dir / manifest.FILE_NAME, target / manifest.FILE_NAME
    try:
        same = source.read_bytes() == existing.read_bytes()
        return same and (target / GRAPH).read_text(encoding="utf-8") == graph
    except (FileNotFoundError, NotADirectoryError):
        return False


def read_config(repository: Path) -> dict[str, Any]:
    """What a repository serves; empty where there is none yet.

    Raises:
        ConfigError: The repository's configuration is another program's.
    """
    path = repository / CONFIG
    if not path.exists():
        return {}
    try:
        config = parse(path.read_text(encoding="utf-8"))
        lists = [config.get(key, []) for key in CONFIG_LISTS]
        # Model Server requires one of them; a `config.json` of anything else has none.
        named = not config or any(key in config for key in CONFIG_LISTS)
        sound = named and all(
            isinstance(entries, list) and all(isinstance(each, dict) for each in entries) for entries in lists
        )
    except (ValueError, AttributeError):
        sound = False
    if not sound:
        raise ConfigError(
            f"{path} is no configuration of OpenVINO Model Server; choose another folder for --ovms",
            code="ovms-config-foreign",
        )
    return dict(config)


def _graph(device: str) -> str:
    """The graph of a text generation: one calculator in a loop, as Model Server's documentation has it."""
    # An NPU takes no batch, and the server then runs its other pipeline, which has no such cache.
    cache = f"\n      cache_size: {CACHE_GB}\n      enable_prefix_caching: true" if device[:3] != "NPU" else ""
    return f"""input_stream: "HTTP_REQUEST_PAYLOAD:input"
output_stream: "HTTP_RESPONSE_PAYLOAD:output"
node {{
  name: "LLMExecutor"
  calculator: "HttpLLMCalculator"
  input_stream: "LOOPBACK:loopback"
  input_stream: "HTTP_REQUEST_PAYLOAD:input"
  input_side_packet: "LLM_NODE_RESOURCES:llm"
  output_stream: "LOOPBACK:loopback"
  output_stream: "HTTP_RESPONSE_PAYLOAD:output"
  input_stream_info {{
    tag_index: "LOOPBACK:0"
    back_edge: true
  }}
  node_options {{
    [type.googleapis.com/mediapipe.LLMCalculatorOptions] {{
      models_path: "./"
      device: "{device}"{cache}
    }}
  }}
  input_stream_handler {{
    input_stream_handler: "SyncSetInputStreamHandler"
    options {{
      [mediapipe.SyncSetInputStreamHandlerOptions.ext] {{
        sync_set {{
          tag_index: "LOOPBACK:0"
        }}
      }}
    }}
  }}
}}
"""
