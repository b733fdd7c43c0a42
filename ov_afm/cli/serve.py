"""`ov-afm serve`: an OpenAI-compatible server that does not fall over.

The HTTP process holds no model: each model has a process of its own, which may die and comes back.

    ov-afm serve models/afm-int4 --port 8000
"""

from __future__ import annotations

import argparse
import os
import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, DeviceError
from ..model_dir import manifest
from ..runtime import loading, lora
from ..system import console
from ..system.resources import require
from .command import command
from .command import parser as command_parser
from .options import key_values, ov_properties

if TYPE_CHECKING:
    from ..serve.app import Settings
    from ..serve.batching import EngineSpec
    from ..serve.engine import Engine
    from ..serve.registry import Limits

__all__ = ["main"]

MODEL_NAME = re.compile(r"[A-Za-z0-9][\w.:/-]{0,99}")
KEY_VARIABLE = "OV_AFM_API_KEY"


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("serve", "Serve models over OpenAI's HTTP API.")
    parser.add_argument("model_dir", nargs="?", metavar="MODEL_DIR", help="model directory made by ov-afm export")
    add = parser.add_argument
    absent = argparse.SUPPRESS
    add("--model", action="append", default=[], metavar="NAME=DIR", help="a model and the name clients use; repeatable")
    add("--adapter", action="append", default=[], metavar="NAME=FILE[:WEIGHT]",
        help="the first model with a LoRA adapter in PEFT's form, under a name of its own; repeatable")  # fmt: skip
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 opens the server to the network")
    add("--port", type=int, default=8000, help="port to listen on; 0 takes a free one")
    add("--api-key", action="append", default=[], metavar="KEY", help=f"key to ask for; also from {KEY_VARIABLE}")
    add("--cors-origin", action="append", default=[], metavar="ORIGIN", help="web origin that may call; repeatable")
    add("--max-body-mb", type=float, default=8, metavar="MB", help="longest request body")
    add("--log-prompts", action="store_true", help="write prompts to the log")
    _add_engine_options(parser)
    group = parser.add_argument_group("limits")
    group.add_argument("--max-queue", type=int, default=absent, metavar="N", help="requests that may wait, then 429")
    group.add_argument("--request-timeout", dest="request_timeout_s", type=float, default=absent, metavar="S",
                       help="longest time for a request (default: 600)")  # fmt: skip
    group.add_argument("--grace", dest="grace_s", type=float, default=absent, metavar="S",
                       help="time for running requests after SIGTERM (default: 30)")  # fmt: skip
    group.add_argument("--idle-unload", dest="idle_unload_s", type=float, default=absent, metavar="S",
                       help="load models on first use and unload them after this long without a request")  # fmt: skip
    group = parser.add_argument_group("scale-out")
    group.add_argument("--ray", action="store_true", help="run as Ray Serve replicas")
    group.add_argument("--replicas", default="1", metavar="MIN:MAX", help="replicas")
    group.add_argument("--ray-address", metavar="ADDRESS", help="cluster to join; without it Ray is started here")
    group.add_argument("--ray-cpus", type=float, default=1, metavar="N", help="CPUs that Ray counts for a replica")
    group.add_argument("--ray-resource", action="append", default=[], metavar="NAME=N",
                       help="custom resource of a replica, e.g. NPU=1; repeatable")  # fmt: skip
    return parser


def _add_engine_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("engine")
    absent = argparse.SUPPRESS

    def add(flag: str, help: str, **kind: Any) -> None:
        group.add_argument(flag, help=help, default=absent, **kind)

    group.add_argument("--device", default="CPU",
                       help="CPU, GPU, GPU.1 or AUTO; NPU and NPU-EMULATED answer one request at a time")  # fmt: skip
    add("--cache-size-gb", "bound of the KV cache (default: by free memory)", type=float, metavar="GB")
    add("--max-running", "sequences generated at once (default: 32)", type=int, metavar="N")
    add("--prefill-tokens", "tokens of a prompt computed in one step (default: 256)", type=int, metavar="N")
    add("--kv-cache", "precision of the KV cache (default: u8)", choices=("u8", "f16", "f32"))
    add("--threads", "CPU threads", type=int, metavar="N")
    group.add_argument(
        "--ov-config", action="append", default=[], metavar="KEY=VALUE", help="OpenVINO property; may be given again"
    )


def _folders(arguments: argparse.Namespace) -> dict[str, Path]:
    """The models to serve, by name; each checked to be whole."""
    folders = {name: Path(folder) for name, folder in key_values(arguments.model, "--model").items()}
    if arguments.model_dir is not None:
        path = loading.locate(arguments.model_dir)
        folders = {path.resolve().name: path, **folders}
    if not folders:
        raise ConfigError("which model? give a model directory, or --model NAME=DIR")
    for name, folder in folders.items():
        _check_name(name, "--model NAME=DIR")
        manifest.verify(loading.locate(str(folder)))
    return folders


def _check_name(name: str, flag: str) -> None:
    if not MODEL_NAME.fullmatch(name):
        raise ConfigError(f"a model's name is letters, digits and . _ : / -, found {name!r}; use {flag}")


def _adapters(arguments: argparse.Namespace, folders: Mapping[str, Path]) -> dict[str, lora.Adapter]:
    """The adapters to serve, by name; each checked to fit the first model."""
    found = {name: lora.read(file) for name, file in key_values(arguments.adapter, "--adapter").items()}
    for name, adapter in found.items():
        _check_name(name, "--adapter NAME=FILE")
        if name in folders:
            raise ConfigError(f"{name!r} names a model and an adapter; give the adapter another name")
        lora.check(adapter, next(iter(folders.values())))
    return found


def _given(kind: type, arguments: argparse.Namespace) -> dict[str, Any]:
    """Those options that are fields of a dataclass and were given."""
    given = vars(arguments)
    found = {field.name: given[field.name] for field in fields(kind) if field.name in given}
    for name, value in found.items():
        if isinstance(value, (int, float)) and value <= 0 and name != "max_queue":
            raise ConfigError(f"{name} must be above 0, found {value:g}")
    return found


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    arguments = _parser().parse_args(argv)
    require("serve", "fastapi", "uvicorn", "prometheus_client")
    folders = _folders(arguments)
    from ..serve.app import Settings, build
    from ..serve.batching import EngineSpec
    from ..serve.registry import Limits, models_for
    from ..serve.sequential import takes_turns

    limits = Limits(**_given(Limits, arguments))
    own = ("model_dir", "adapter")
    spec_fields = {key: value for key, value in _given(EngineSpec, arguments).items() if key not in own}
    specs = {
        name: EngineSpec(str(folder.resolve()), **{**spec_fields, "ov_config": ov_properties(arguments.ov_config)})
        for name, folder in folders.items()
    }
    if takes_turns(arguments.device):
        specs = {name: replace(spec, max_running=1) for name, spec in specs.items()}
    first = next(iter(specs.values()))
    specs |= {
        name: replace(first, adapter=(str(adapter.path.resolve()), adapter.weight))
        for name, adapter in _adapters(arguments, folders).items()
    }
    keys = tuple(arguments.api_key) or tuple(filter(None, [os.environ.get(KEY_VARIABLE)]))
    settings = Settings(
        api_keys=keys,
        max_body_bytes=int(arguments.max_body_mb * 2**20),
        cors_origins=tuple(arguments.cors_origin),
        log_prompts=arguments.log_prompts,
    )
    if arguments.ray:
        return _scale(specs, limits, settings, arguments)
    models = models_for(specs, limits)
    engines = models.engines
    _serve(build(models, settings), engines, arguments.host, arguments.port, limits.grace_s)
    problem = next((engine.problem for engine in engines.values() if engine.problem), None)
    if problem is not None:
        raise DeviceError(problem)
    return 0


def _scale(specs: dict[str, EngineSpec], limits: Limits, settings: Settings, arguments: argparse.Namespace) -> int:
    require("scale", "ray")
    from ..serve.ray import deploy

    resources: dict[str, float] = {}
    for name, amount in key_values(arguments.ray_resource, "--ray-resource").items():
        try:
            resources[name] = float(amount)
        except ValueError as error:
            raise ConfigError(f"--ray-resource takes NAME=NUMBER, found {name}={amount}") from error
    cluster = deploy.Cluster(
        deploy.replica_range(arguments.replicas), arguments.ray_address, arguments.ray_cpus, resources
    )
    deploy.run(specs, limits, settings, cluster, host=arguments.host, port=arguments.port)
    return 0


def _serve(app: Any, engines: dict[str, Engine], host: str, port: int, grace_s: float) -> None:
    """Run until a signal, or until the only model turns out to be unusable."""
    import uvicorn

    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=max(1, round(grace_s)),
        server_header=False,
        h11_max_incomplete_event_size=64 * 1024,
    )

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[Any] | None = None) -> None:
            await super().startup(sockets)
            for listener in self.servers:
                for each in listener.sockets:
                    address, port = each.getsockname()[:2]
                    console.note(f"listening on http://{address}:{port}/v1 (pid {os.getpid()})")

    server = Server(config)
    for name, engine in engines.items():
        engine.on_ready = lambda name=name, engine=engine: console.note(  # type: ignore[misc]
            f"serving {name} on {engine.info['device']}, context {engine.info['context_length']} tokens"
        )
        if len(engines) == 1:
            engine.on_unusable = lambda: setattr(server, "should_exit", True)
    # uvicorn raises the signal again when it is done; that must not end the process with the signal's status.
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGINT, lambda *_: None)
    server.run()
