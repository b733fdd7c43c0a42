"""What `ov-afm evaluate` measures of a model beyond one text: long context, tasks, the harness, speed and energy."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..system import console, resources
from . import long_context
from .lm_eval import run_harness
from .speed import Speed, measure_speed
from .tasks import Result, load_tasks, run_tasks
from .text import load_text

__all__ = ["Suite", "SuiteResult"]


@dataclass(frozen=True, slots=True)
class SuiteResult:
    """Results of one model; empty where nothing was requested."""

    tasks: list[Result] = field(default_factory=list)
    harness: dict[str, dict[str, float]] = field(default_factory=dict)
    long: long_context.LongContext | None = None
    speed: Speed | None = None

    def to_dict(self) -> dict[str, Any]:
        """All figures, for JSON."""
        return {key: value for key, value in asdict(self).items() if value}

    def blocks(self, model: str, *, tasks: bool = True) -> list[str]:
        """Tables and lines for people, one block each.

        Args:
            model: The model's name.
            tasks: Include the results of tasks.
        """
        blocks = [long_context.markdown(self.long)] if self.long else []
        if tasks and self.tasks:
            blocks.append("\n".join(f"{model}, {each.tasks}: {each.share}" for each in self.tasks))
        for name, metrics in self.harness.items():
            figures = ", ".join(f"{key.removesuffix(',none')} {value:.4g}" for key, value in metrics.items())
            blocks.append(f"{model}, {name}: {figures}")
        return blocks


@dataclass(frozen=True, slots=True)
class Suite:
    """What to measure.

    Attributes:
        text: Text for perplexity along the context; None takes the packaged one.
        long: Needles and perplexity along the context.
        long_tokens: Longest prompt of these; the model's context if None.
        tasks: Sets of tasks, see `tasks.load_tasks`.
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
            ConfigError: A set of tasks, the harness or its folder is missing.
        """
        for name in self.tasks:
            load_tasks(name)
        if self.harness:
            resources.require("eval", "lm_eval")
        if self.task_dir is not None and not Path(self.task_dir).is_dir():
            raise ConfigError(f"no such folder of task files: {self.task_dir}", code="task-dir-missing")

    def measure(self, model: str | Path, progress: console.Progress) -> SuiteResult:
        """Measure a model directory.

        Raises:
            OVAFMError: Something cannot be measured, see the modules of each.
        """
        long = None
        if self.long:
            text, defaults = load_text(self.text), self.runtime_defaults
            long = long_context.long_context(model, text, progress, self.long_tokens, runtime_defaults=defaults)
        return SuiteResult(
            run_tasks(model, self.tasks, progress) if self.tasks else [],
            run_harness(model, self.harness, progress, task_dir=self.task_dir) if self.harness else {},
            long,
            measure_speed(model, progress) if self.speed else None,
        )
