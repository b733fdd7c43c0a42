"""The same service on many machines: each Ray Serve replica holds the HTTP application and its engine.

Ray places replicas by the resources that they ask for, adds and removes them by the requests being
answered, and replaces those that die; `router` chooses among them. Within a replica everything is as on
one machine, including the bounded queue and its status 429.
"""

from __future__ import annotations

import logging
import re
import signal
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

from ...errors import ConfigError, DeviceError
from ...system import console
from ..app import Settings
from ..messages import EngineSpec
from ..registry import Limits

__all__ = ["Cluster", "replica_range", "run"]

logger = logging.getLogger(__name__)

APPLICATION = "ov_afm"
# Health checks and lists of models do not wait behind generations.
OTHER_REQUESTS = 16
# When one dies, the other still takes requests.
ROUTERS = 2
POLL_S = 0.5
DRAIN_POLL_S = 0.05
SETTLE_S = 0.5
REACH_S = 5
# Ray's report of a replica that cannot load its model ends with our error.
PROBLEM = re.compile(r"^ov_afm\.errors\.DeviceError: (.+)", re.MULTILINE)


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
        raise ConfigError(f"replicas are a number or MIN:MAX, found {text!r}", code="replica-range")
    return least, most


def run(
    specs: Mapping[str, EngineSpec], limits: Limits, settings: Settings, cluster: Cluster, *, host: str, port: int
) -> None:
    """Deploy the service and keep it until SIGTERM or Ctrl-C.

    Args:
        specs: What each replica loads, by name.
        limits: Bounds of each replica.
        settings: How to behave.
        cluster: How to spread it.
        host: Address that Ray's proxies listen on.
        port: Their port.

    Raises:
        ConfigError: No cluster answers at that address.
        DeviceError: The model cannot be loaded on a replica.
    """
    import ray
    from ray import serve

    from .replica import Replica
    from .router import Router

    console.note("starting Ray" if cluster.address is None else f"joining the cluster at {cluster.address}")
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        _reach(cluster.address)
        ray.init(address=cluster.address, log_to_driver=False, configure_logging=False, ignore_reinit_error=True)
    except (OSError, ValueError) as error:
        message = f"no Ray cluster at {cluster.address}: {_line(error)}; start one with: ray start --head"
        raise ConfigError(message, code="no-ray-cluster") from error
    stop = threading.Event()

    def leave(*_: object) -> None:
        if stop.is_set():
            # The second signal: do not wait for running requests.
            raise KeyboardInterrupt
        stop.set()

    # Only now: Ray installs handlers of its own.
    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGINT, leave)
    started = False
    try:
        serve.start(http_options={"host": host, "port": port})
        running = max(spec.max_running for spec in specs.values())
        least, most = cluster.replicas
        replicas = serve.deployment(Replica).options(
            autoscaling_config={"min_replicas": least, "max_replicas": most, "target_ongoing_requests": running},
            max_ongoing_requests=running + limits.max_queue + OTHER_REQUESTS,
            # Ray's own queue holds requests only while no replica is available: each replica has its own queue.
            max_queued_requests=most * (running + limits.max_queue),
            graceful_shutdown_timeout_s=limits.grace_s,
            health_check_period_s=5,
            ray_actor_options={"num_cpus": cluster.cpus, "resources": dict(cluster.resources or {})},
        )
        routers = min(most, ROUTERS)
        router = serve.deployment(serve.ingress()(Router)).options(
            num_replicas=routers,
            max_ongoing_requests=most * (running + limits.max_queue + OTHER_REQUESTS),
            graceful_shutdown_timeout_s=limits.grace_s,
            ray_actor_options={"num_cpus": 0},
        )
        application = router.bind(replicas.bind(specs, limits, settings), settings.max_body_bytes)
        target = serve.RunTarget(application, name=APPLICATION, route_prefix="/")
        serve.run_many([target], wait_for_applications_running=False)
        started = _started(stop)
        if started:
            console.note(f"serving {', '.join(specs)} on {least} to {most} replicas: http://{host}:{port}/v1")
            stop.wait()
            _drain(routers, limits.grace_s)
    finally:
        # Shutting down a Ray that was started here ends everything in it. Until then its proxies would say 404.
        if cluster.address is not None:
            serve.delete(APPLICATION)
        ray.shutdown()


def _reach(address: str | None) -> None:
    """Raise OSError at once if nobody listens at `HOST:PORT`: Ray would try for minutes."""
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), REACH_S).close()


def _started(stop: threading.Event) -> bool:
    """Wait until every replica has loaded its model, and print what Ray reports meanwhile; false if stopped before.

    Raises:
        DeviceError: A replica cannot load the model.
    """
    from ray import serve

    console.note("loading the model on each replica")
    printed = ""
    while not stop.wait(POLL_S):
        application = serve.status().applications[APPLICATION]
        if application.status == "RUNNING":
            return True
        replicas = application.deployments.get("Replica")
        message = replicas.message if replicas else application.message
        if (problem := PROBLEM.search(message)) or application.status == "DEPLOY_FAILED":
            raise DeviceError(problem[1] if problem else _line(message))
        if message and message != printed:
            printed = message
            console.note(_line(message))
    return False


def _drain(routers: int, grace_s: float) -> None:
    """Let no further request in, and wait until those that run are answered.

    Args:
        routers: Number of routers; each is asked until all have said that they are done.
        grace_s: Longest time to wait.
    """
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    running: dict[str, int] = {}
    deadline = time.monotonic() + grace_s
    while time.monotonic() < deadline and (len(running) < routers or any(running.values())):
        try:
            name, count = serve.get_app_handle(APPLICATION).drain.remote().result(timeout_s=REACH_S)
        except (RayError, RayServeException, TimeoutError) as error:
            logger.warning("a router does not answer: %s", _line(error))
        else:
            running[name] = count
        time.sleep(DRAIN_POLL_S)
    # The last words are on their way through a proxy.
    time.sleep(SETTLE_S)


def _line(message: object) -> str:
    """The first line of a message from Ray."""
    return str(message).strip().partition("\n")[0]
