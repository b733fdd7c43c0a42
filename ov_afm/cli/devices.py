"""`ov-afm devices`: this machine's devices, what they can run, and whether their answers are right."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ..model_dir.model_directory import ModelDirectory
from ..runtime import device_cache, device_report, devices
from ..runtime.properties import DEFAULT_CONTEXT_TOKENS
from ..system.console import human_bytes, load_display
from .command import command, command_parser

__all__ = ["main"]


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run `ov-afm devices`."""
    options = command_parser("devices", "List this machine's devices and what they can run, or test one.")
    options.add_argument("model", nargs="?", metavar="MODEL_DIR", help="show also how this model would be loaded")
    options.add_argument("--test", metavar="MODEL_DIR", help="compare each device's answers with the recorded ones")
    options.add_argument("--device", nargs="+", metavar="DEVICE", help="with --test: devices to test instead of all")
    options.add_argument("--clear-cache", action="store_true", help="delete compiled models, verdicts and load times")
    options.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = options.parse_args(argv)
    if arguments.device and not arguments.test:
        options.error("--device needs --test MODEL_DIR")
    if arguments.clear_cache:
        freed = device_cache.clear()
        print(json.dumps({"freed_bytes": freed}) if arguments.json else f"freed {human_bytes(freed)}")
        return 0
    if arguments.test:
        return _test(ModelDirectory.open(arguments.test), arguments.device, as_json=arguments.json)
    report = device_report.describe(ModelDirectory.open(arguments.model) if arguments.model else None)
    print(json.dumps(report, ensure_ascii=False) if arguments.json else _render(report))
    return 0


def _test(model: ModelDirectory, names: list[str] | None, *, as_json: bool) -> int:
    verdicts = {}
    for name in names or [each.name for each in devices.inventory().devices]:
        with load_display() as on_phase:
            verdict = verdicts[name] = device_report.test(model, name, on_phase)
        label = "emulated NPU" if name.upper() == devices.EMULATED_NPU else name
        if not as_json:
            print(f"{label}: {'passed' if verdict.passed else 'FAILED'}: {verdict.evidence}", flush=True)
    if as_json:
        print(json.dumps({name: asdict(verdict) for name, verdict in verdicts.items()}, ensure_ascii=False))
    return 0 if all(verdict.passed for verdict in verdicts.values()) else 1


def _render(report: dict[str, Any]) -> str:
    """The report as lines of text."""
    lines: list[str] = []
    for row in report["devices"]:
        memory = human_bytes(row["memory_bytes"]) if row["memory_bytes"] else "unknown"
        lines += [
            f"{row['name']}: {row['full_name']}",
            f"  driver {row['driver'] or 'none'}, memory {memory}, computes in {' '.join(row['capabilities'])}",
            f"  recipes: {', '.join(row['recipes'])}",
        ]
        lines += [
            f"  known fault of this driver: {fault['what']}; {fault['advice']} ({fault['source']})"
            for fault in row["driver_faults"]
        ]
        if "model" in row:
            lines += [f"  {line}" for line in _model_lines(row["model"])]
    lines += [f"{kind}: could not be probed: {reason}" for kind, reason in report["not_usable"].items()]
    present = {row["name"].partition(".")[0] for row in report["devices"]} | set(report["not_usable"])
    lines += [f"{kind}: not here" for kind in devices.KINDS if kind not in present]
    return "\n".join(lines)


def _model_lines(model: dict[str, Any]) -> list[str]:
    if model["refused"]:
        return [f"this model: cannot run ({', '.join(model['refused'])})"]
    shown = ", ".join(f"{key}={value}" for key, value in model["properties"].items()) or "the plugin's defaults"
    lines = [f"this model: loaded with {shown}"]
    if model["memory_bytes"] is not None:
        need = human_bytes(model["memory_bytes"])
        lines.append(f"  needs {need} or more with a context of up to {DEFAULT_CONTEXT_TOKENS} tokens")
    if model["compiled"] is not None:
        compiled = "compiled before: loads fast" if model["compiled"] else "not compiled yet: the first load is slow"
        lines.append(f"  {compiled}")
    if model["kernels"]:
        lines.append(f"  ReLU² kernels: {model['kernels']['text']}")
    if model["self_test"]:
        outcome = "passed" if model["self_test"]["passed"] else "FAILED"
        lines.append(f"  self-test {outcome} on {model['self_test']['on']}: {model['self_test']['evidence']}")
    return lines
