"""What `ov-afm evaluate` measures of a model beyond one text: long context, tasks, the harness, speed and energy."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..system import console, resources
from . import long_context, scorecard
from .lm_eval import run_harness
from .tasks import Result, load_tasks, run_tasks
from .text import load_text

__all__ = ["Extras", "Wanted", "measure"]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be measured.

    Attributes:
        text: Text for perplexity along the context; None takes the packaged one.
        long: Needles and perplexity along the context.
        long_tokens: Longest prompt of these; the model's context if None.
        tasks: Sets of tasks, see `eval_tasks.load_tasks`.
        harness: Tasks of lm-evaluation-harness.
        task_dir: Folder with its task files.
        speed: Speed and energy.
        runtime_defaults: Run `long` as users do instead of at f32.
    """

    text: str | None = None
    long: bool = False
    long_tokens: int | None = None
    tasks: tuple[str, ...] = ()
    harness: tuple[str, ...] = ()
    task_dir: str | None = None
    speed: bool = False
    runtime_defaults: bool = False

    def check(self) -> None:
        """Refuse what cannot be measured, before anything is.

        Raises:
            ConfigError: A set of tasks, the harness or its folder is not there.
        """
        for name in self.tasks:
            load_tasks(name)
        if self.harness:
            resources.require("eval", "lm_eval")
        if self.task_dir is not None and not Path(self.task_dir).is_dir():
            raise ConfigError(f"no such folder of task files: {self.task_dir}")


@dataclass(frozen=True, slots=True)
class Extras:
    """What was measured; empty where it was not asked for."""

    long: long_context.LongContext | None = None
    tasks: list[Result] = field(default_factory=list)
    harness: dict[str, dict[str, float]] = field(default_factory=dict)
    speed: scorecard.Speed | None = None

    def to_dict(self) -> dict[str, Any]:
        """All figures, for JSON."""
        found: dict[str, Any] = {"tasks": [each.to_dict() for each in self.tasks], "harness": self.harness}
        found["long"] = self.long.to_dict() if self.long else None
        found["speed"] = self.speed.to_dict() if self.speed else None
        return {key: value for key, value in found.items() if value}

    def blocks(self, model: str, *, tasks: bool = True) -> list[str]:
        """Tables and lines for people, each for a block of its own.

        Args:
            model: The model's name.
            tasks: Say how the tasks went, too.
        """
        found = [long_context.markdown(self.long)] if self.long else []
        if tasks and self.tasks:
            found.append("\n".join(f"{model}, {each.tasks}: {scorecard.share(each)}" for each in self.tasks))
        for name, metrics in self.harness.items():
            figures = ", ".join(f"{key.removesuffix(',none')} {value:.4g}" for key, value in metrics.items())
            found.append(f"{model}, {name}: {figures}")
        return found


def measure(model: str | Path, wanted: Wanted) -> Extras:
    """Measure a model directory.

    Raises:
        OVAFMError: Something cannot be measured, see the modules of each.
    """
    with console.Progress() as progress:
        long = None
        if wanted.long:
            long = long_context.long_context(
                model,
                load_text(wanted.text),
                progress,
                max_tokens=wanted.long_tokens,
                runtime_defaults=wanted.runtime_defaults,
            )
        tasks = run_tasks(model, wanted.tasks, progress) if wanted.tasks else []
        folder = None if wanted.task_dir is None else Path(wanted.task_dir)
        harness = run_harness(model, wanted.harness, progress, task_dir=folder) if wanted.harness else {}
        speed = scorecard.measure_speed(model, progress) if wanted.speed else None
    return Extras(long, tasks, harness, speed)
