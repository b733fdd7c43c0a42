"""`ov-afm serve`: an OpenAI-compatible server.

The HTTP process holds no model: each model has a process of its own, which is started again when it dies.

    ov-afm serve models/afm-int4 --port 8000
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..model_dir.model_directory import ModelDirectory
from ..model_dir.text_encoder import EMBEDDING, RERANKING, TEXT_GENERATION
from ..runtime import lora
from ..runtime.rules import kind_of
from ..serve import clients
from ..serve.clients import CLIENTS
from ..system.resources import require
from .command import command, command_parser, given
from .options import key_values, ov_properties, prompt_cache

if TYPE_CHECKING:
    from ..serve.hosts import HostRules
    from ..serve.messages import EngineSpec
    from ..serve.ray.deploy import Cluster

__all__ = ["main"]

MODEL_NAME = re.compile(r"[A-Za-z0-9][\w.:/-]{0,99}")
ALIAS = re.compile(r"[A-Za-z0-9*?][\w.:/*?-]{0,99}")
KEY_VARIABLE = "OV_AFM_API_KEY"


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("serve", "Serve models over OpenAI's HTTP API.")
    parser.add_argument("model_dir", nargs="?", metavar="MODEL_DIR", help="model directory made by ov-afm export")
    add, add_list = parser.add_argument, partial(parser.add_argument, action="append", default=[])
    add_list("--model", metavar="NAME=DIR", help="a model and the name that clients use; repeatable")
    adapter = "the first model with a LoRA adapter in PEFT's format, under its own name; repeatable"
    add_list("--adapter", metavar="NAME=FILE[:WEIGHT]", help=adapter)
    alias = "another name for a model, such as 'claude-*=NAME' (* and ? stand for other characters); repeatable"
    add_list("--alias", metavar="NAME=MODEL", help=alias)
    host = "address to listen on; localhost is 127.0.0.1 and ::1, 0.0.0.0 opens the server to the network"
    add("--host", default="localhost", help=f"{host} (default: localhost)")
    add("--port", type=int, default=8000, help="port to listen on; 0 takes a free one")
    key = f"key that clients must send; repeatable; also from {KEY_VARIABLE}"
    add_list("--api-key", metavar="KEY", help=key)
    allowed = "another name by which clients reach a server without a key, or * for any; repeatable"
    add_list("--allowed-host", metavar="NAME", help=allowed)
    add_list("--cors-origin", metavar="ORIGIN", help="web origin that may call; repeatable")
    add("--max-body-mb", type=float, default=8, metavar="MB", help="longest request body")
    add("--log-prompts", action="store_true", help="write prompts to the log")
    cut = "cut texts for embedding and reranking that are too long, instead of refusing them"
    add("--truncate", action="store_true", help=cut)
    client = "print the settings of this program for the server, after a check that the model can do what it needs"
    add("--for", dest="client", choices=CLIENTS, help=client)
    # Options of these groups that are not given stay out: `EngineSpec` and `Limits` have the defaults.
    add = partial(parser.add_argument_group("engine").add_argument, default=argparse.SUPPRESS)
    device = "CPU, GPU, GPU.1 or AUTO; NPU and NPU-EMULATED answer one request at a time"
    add("--device", default="CPU", help=device)
    add("--cache-size-gb", type=float, metavar="GB", help="bound of the KV cache (default: by free memory)")
    add("--max-running", type=int, metavar="N", help="sequences generated at once (default: 32)")
    add("--prefill-tokens", type=int, metavar="N", help="tokens of a prompt computed in one step (default: 256)")
    add("--kv-cache", choices=("u8", "f16", "f32"), help="precision of the KV cache (default: u8)")
    add("--threads", type=int, metavar="N", help="CPU threads")
    lock = "keep the weights in memory, whatever else wants it (CPU, Linux)"
    add("--lock-memory", action="store_true", help=lock)
    same = "same seed, same text: one sequence at a time, and no use of earlier prompts"
    add("--deterministic", action="store_true", help=same)
    keep = "keep computed prompts in this folder, for the next start too; CPU, with --max-running 1"
    add("--prompt-cache", type=Path, metavar="DIR", help=keep)
    add("--prompt-cache-gb", type=float, metavar="GB", help="bound of that folder (default: 10)")
    add("--ov-config", action="append", default=[], metavar="KEY=VALUE", help="OpenVINO property; repeatable")
    add = partial(parser.add_argument_group("limits").add_argument, default=argparse.SUPPRESS)
    add("--max-queue", type=int, metavar="N", help="requests that may wait; more get status 429 (default: 64)")
    seconds = partial(add, type=float, metavar="S")
    seconds("--request-timeout", dest="request_timeout_s", help="longest time for a request (default: 600)")
    seconds("--grace", dest="grace_s", help="time for running requests after SIGTERM (default: 30)")
    idle = "load models on first use and unload them after this long without a request"
    seconds("--idle-unload", dest="idle_unload_s", help=idle)
    add = parser.add_argument_group("scale-out").add_argument
    add("--ray", action="store_true", help="run as Ray Serve replicas")
    add("--replicas", default="1", metavar="MIN:MAX", help="number of replicas, or their range")
    add("--ray-address", metavar="ADDRESS", help="cluster to join; without it, Ray is started on this machine")
    add("--ray-cpus", type=float, default=1, metavar="N", help="CPUs that Ray reserves for a replica")
    resource = "custom resource of a replica, e.g. NPU=1; repeatable"
    add("--ray-resource", action="append", default=[], metavar="NAME=N", help=resource)
    return parser


def _models(arguments: argparse.Namespace) -> dict[str, ModelDirectory]:
    """The models to serve, by name; each checked to be whole."""
    models = {}
    if arguments.model_dir is not None:
        model = ModelDirectory.open(arguments.model_dir, any_task=True)
        _check_name(model.name, "--model NAME=DIR")
        models[model.name] = model
    for name, folder in key_values(arguments.model, "--model").items():
        _check_name(name, "--model NAME=DIR")
        models[name] = ModelDirectory.open(folder, any_task=True)
    if not models:
        raise ConfigError("which model? give a model directory, or --model NAME=DIR", code="no-model")
    return models


def _check_name(name: str, flag: str) -> None:
    if not MODEL_NAME.fullmatch(name):
        message = f"a model's name is letters, digits and . _ : / -, found {name!r}; use {flag}"
        raise ConfigError(message, code="model-name")


def _adapters(arguments: argparse.Namespace, models: Mapping[str, ModelDirectory]) -> dict[str, lora.Adapter]:
    """The adapters to serve, by name; each checked to fit the first model."""
    adapters = {name: lora.read(file) for name, file in key_values(arguments.adapter, "--adapter").items()}
    for name, adapter in adapters.items():
        _check_name(name, "--adapter NAME=FILE")
        if name in models:
            message = f"{name!r} names a model and an adapter; give the adapter another name"
            raise ConfigError(message, code="name-taken")
        lora.check(adapter, _writers(models)[0])
    return adapters


def _writers(models: Mapping[str, ModelDirectory]) -> list[ModelDirectory]:
    """The models that write text."""
    if writers := [model for model in models.values() if model.text_encoder is None]:
        return writers
    raise ConfigError("an adapter needs a model that writes text; serve its base model too", code="no-model")


def _aliases(arguments: argparse.Namespace, models: Collection[str]) -> dict[str, str]:
    """The other names of models; each means a model that is served."""
    aliases = key_values(arguments.alias, "--alias")
    for name, model in aliases.items():
        if not ALIAS.fullmatch(name):
            message = f"an alias is letters, digits and . _ : / - with * and ? for others, found {name!r}"
            raise ConfigError(message, code="model-name")
        if model not in models:
            message = f"--alias {name}={model} names no model that is served; there are: {', '.join(models)}"
            raise ConfigError(message, code="alias-without-model")
        if name in models:
            raise ConfigError(f"{name!r} names a model already; give the alias another name", code="name-taken")
    return aliases


def _host_rules(arguments: argparse.Namespace, api_keys: Sequence[str]) -> HostRules | None:
    """Hosts and origins that may ask; None, if a key protects the server and no names are given."""
    from ..serve.hosts import HOST, HostRules, is_loopback

    hosts: list[str] = arguments.allowed_host
    if api_keys and not hosts:
        return None
    for host in hosts:
        if host != "*" and not (host and (match := HOST.fullmatch(host)) and match["name"] == host):
            message = f"--allowed-host takes a name or an address without port, found {host!r}"
            raise ConfigError(message, code="allowed-host")
    names = frozenset(host.strip("[]").lower() for host in hosts)
    return HostRules(is_loopback(arguments.host), names, frozenset(arguments.cors_origin))


def _serve_client(arguments: argparse.Namespace, specs: Mapping[str, EngineSpec], api_keys: Sequence[str]) -> None:
    """Print what the program of `--for` needs to know, and start the server with what it needs.

    Raises:
        ConfigError: The model, or an option, is none for it.
    """
    from ..serve.model_facts import ModelFacts
    from ..serve.registry import Limits, Models

    models = Models(specs, Limits())
    facts = ModelFacts(models)
    if arguments.port == 0:
        raise ConfigError("--for prints the port; give one with --port", code="client-port")
    host = "127.0.0.1" if arguments.host in ("localhost", "0.0.0.0", "::") else arguments.host
    first = {task: name for name in reversed(models.engines) if (task := models.task(name))}
    if TEXT_GENERATION not in first:
        raise ConfigError("--for needs a model that writes text; serve one", code="no-model")
    name = first[TEXT_GENERATION]
    endpoint = clients.Endpoint(
        url=f"http://{f'[{host}]' if ':' in host else host}:{arguments.port}",
        model=name,
        context=facts.context_length(name),
        key=next(iter(api_keys), ""),
        embeddings=first.get(EMBEDDING, ""),
        reranker=first.get(RERANKING, ""),
    )
    clients.check(arguments.client, endpoint, tools=facts.abilities(name).tools)
    client = CLIENTS[arguments.client]
    if client.alias and client.alias not in key_values(arguments.alias, "--alias"):
        # Options that are not given share one empty list.
        arguments.alias = [*arguments.alias, f"{client.alias}={name}"]
    arguments.truncate = arguments.truncate or client.truncate
    print(clients.settings(arguments.client, endpoint), flush=True)


def _positive(values: dict[str, Any]) -> dict[str, Any]:
    """The same values; numbers must be above 0, except for `max_queue`."""
    for name, value in values.items():
        if isinstance(value, (int, float)) and value <= 0 and name != "max_queue":
            raise ConfigError(f"{name} must be above 0, found {value:g}", code="not-positive")
    return values


def _specs(arguments: argparse.Namespace) -> dict[str, EngineSpec]:
    """What each engine loads, by the name that clients use."""
    from ..serve.messages import EngineSpec
    from ..serve.sequential import one_at_a_time

    models = _models(arguments)
    options = _positive(given(EngineSpec, arguments)) | {"ov_config": ov_properties(arguments.ov_config)}
    if one_at_a_time(arguments.device):
        options["max_running"] = 1
    options |= _repeatable(arguments, options)
    specs = {
        name: EngineSpec(
            **options | {"model_dir": model.path.resolve(), "adapter": None, "text_encoder": model.text_encoder}
        )
        for name, model in models.items()
    }
    first = next((spec for spec in specs.values() if spec.text_encoder is None), None)
    for name, adapter in _adapters(arguments, models).items():
        assert first is not None  # An adapter was checked against it.
        specs[name] = replace(first, adapter=(adapter.path.resolve(), adapter.weight))
    return specs


def _repeatable(arguments: argparse.Namespace, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that `--deterministic` and `--prompt-cache` stand for."""
    asked, kept = vars(arguments), prompt_cache(arguments)
    flags = {"deterministic": "--deterministic", "prompt_cache": "--prompt-cache"}
    names = [flag for name, flag in flags.items() if name in asked]
    if not names:
        return {}
    if options.get("max_running", 1) != 1:
        message = f"{' and '.join(names)} means one sequence at a time; give --max-running 1, or leave it out"
        raise ConfigError(message, code="one-at-a-time")
    if kept is None:
        return {"max_running": 1}
    conflicts = {
        "--cache-size-gb": "cache_size_gb" in asked,
        "--prefill-tokens": "prefill_tokens" in asked,
        "--adapter": arguments.adapter,
        f"--device {arguments.device}": kind_of(arguments.device) in ("GPU", "NPU"),
    }
    if found := [flag for flag, given_too in conflicts.items() if given_too]:
        message = f"--prompt-cache does not go together with {', '.join(found)}; leave one of them out"
        raise ConfigError(message, code="prompt-cache-option")
    return {"max_running": 1, "prompt_cache": kept}


def _cluster(arguments: argparse.Namespace) -> Cluster:
    require("scale", "ray")
    from ..serve.ray.deploy import Cluster, replica_range

    resources: dict[str, float] = {}
    for name, amount in key_values(arguments.ray_resource, "--ray-resource").items():
        try:
            resources[name] = float(amount)
        except ValueError as error:
            message = f"--ray-resource takes NAME=NUMBER, found {name}={amount}"
            raise ConfigError(message, code="key-value") from error
    return Cluster(replica_range(arguments.replicas), arguments.ray_address, arguments.ray_cpus, resources)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    arguments = _parser().parse_args(argv)
    require("serve", "fastapi", "uvicorn", "prometheus_client", "sse_starlette")
    specs = _specs(arguments)
    from ..serve.registry import Limits, Models
    from ..serve.service import Settings

    limits = Limits(**_positive(given(Limits, arguments)))
    api_keys = tuple(arguments.api_key) or tuple(filter(None, [os.environ.get(KEY_VARIABLE)]))
    if arguments.client is not None:
        _serve_client(arguments, specs, api_keys)
    settings = Settings(
        api_keys=api_keys,
        hosts=_host_rules(arguments, api_keys),
        max_body_bytes=int(arguments.max_body_mb * 2**20),
        cors_origins=tuple(arguments.cors_origin),
        log_prompts=arguments.log_prompts,
        truncate=arguments.truncate,
        aliases=_aliases(arguments, specs),
    )
    if arguments.ray:
        cluster = _cluster(arguments)
        from ..serve.ray import deploy

        # Ray's proxies listen on one address.
        host = "127.0.0.1" if arguments.host == "localhost" else arguments.host
        deploy.run(specs, limits, settings, cluster, host=host, port=arguments.port)
    else:
        from ..serve import http_server

        models = Models(specs, limits, settings.aliases)
        http_server.run(models, settings, host=arguments.host, port=arguments.port, grace_s=limits.grace_s)
    return 0
