"""The same service on many machines: each Ray Serve replica holds the HTTP application and its engine.

Ray places replicas by the resources that they ask for, adds and removes them by the requests under
way, and replaces those that die; within a replica everything is as on one machine, the bounded line
and its 429 included.
"""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .. import console
from ..errors import ConfigError, DeviceError
from .app import Settings, build
from .batch import EngineSpec
from .models import Limits, models_for

__all__ = ["Cluster", "replica_range", "run"]

APPLICATION = "ov_afm"
# Health checks and lists of models do not wait behind generations.
OTHER_REQUESTS = 16


@dataclass(frozen=True, slots=True)
class Cluster:
    """How the service is spread.

    Attributes:
        replicas: Least and most replicas.
        address: The cluster's address; None starts Ray on this machine.
        cpus: CPUs that Ray counts for a replica.
        resources: Custom resources of a replica, `{"NPU": 1}` for one.
    """

    replicas: tuple[int, int] = (1, 1)
    address: str | None = None
    cpus: float = 1
    resources: Mapping[str, float] | None = None


def replica_range(text: str) -> tuple[int, int]:
    """Read `2` or `2:8`.

    Raises:
        ConfigError: It is neither.
    """
    match = re.fullmatch(r"([1-9]\d*)(?::([1-9]\d*))?", text)
    least, most = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 0 < least <= most:
        msg = f"replicas are a number or MIN:MAX, found {text!r}"
        raise ConfigError(msg)
    return least, most


class Replica:
    """One replica: started by Ray, ready when its model is.

    Args:
        specs: What to load, by name.
        limits: Bounds of the service.
        settings: How to behave.
    """

    def __init__(self, specs: Mapping[str, EngineSpec], limits: Limits, settings: Settings) -> None:
        self._models = models_for(specs, limits)
        self._settings = settings

    def __serve_build_asgi_app__(self) -> Any:
        """The application that Ray serves."""
        return build(self._models, self._settings)

    async def check_health(self) -> None:
        """Tell Ray to replace this replica.

        Raises:
            DeviceError: An engine can never be loaded here.
        """
        for engine in self._models.engines.values():
            if engine.problem is not None:
                raise DeviceError(engine.problem)


def run(
    specs: Mapping[str, EngineSpec],
    limits: Limits,
    settings: Settings,
    cluster: Cluster,
    *,
    host: str,
    port: int,
) -> None:
    """Deploy the service and keep it until SIGTERM or Ctrl-C.

    Args:
        specs: What each replica loads, by name.
        limits: Bounds of each replica.
        settings: How to behave.
        cluster: How to spread it.
        host: Address that Ray's proxies listen on.
        port: Their port.
    """
    import ray
    from ray import serve

    ray.init(address=cluster.address, log_to_driver=False, configure_logging=False, ignore_reinit_error=True)
    stop = threading.Event()
    # Only now: Ray installs handlers of its own.
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    signal.signal(signal.SIGINT, lambda *_: stop.set())
    try:
        serve.start(http_options={"host": host, "port": port})
        running = max(spec.max_running for spec in specs.values())
        least, most = cluster.replicas
        deployment = serve.deployment(serve.ingress()(Replica)).options(
            name="Replica",
            autoscaling_config={"min_replicas": least, "max_replicas": most, "target_ongoing_requests": running},
            max_ongoing_requests=running + limits.max_queue + OTHER_REQUESTS,
            graceful_shutdown_timeout_s=limits.grace_s,
            health_check_period_s=5,
            ray_actor_options={"num_cpus": cluster.cpus, "resources": dict(cluster.resources or {})},
        )
        serve.run(deployment.bind(specs, limits, settings), name=APPLICATION, route_prefix="/")
        console.note(f"serving {', '.join(specs)} on {least} to {most} replicas: http://{host}:{port}/v1")
        stop.wait()
        serve.delete(APPLICATION)
    finally:
        if cluster.address is None:
            serve.shutdown()
        ray.shutdown()
