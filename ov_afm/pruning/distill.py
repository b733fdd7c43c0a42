"""Healing: knowledge distillation, in which a pruned model learns to predict what the original predicts.

Student and teacher read the same calibration text; what is minimised is KL(teacher || student) of the next-token
distribution. Small models are trained whole, large ones through LoRA (PEFT) that is merged afterwards. The state is
saved every minute, so that an interrupted run is continued where it stopped.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from ..conversion import source_tokenizer
from ..conversion.tensors import load
from ..quantization import calibration
from ..system.atomic import replacing
from ..system.child_process import Progress, emit
from .checkpoint import copy_texts

__all__ = ["heal"]

# Above it, training all weights with Adam takes 16 bytes for each, and LoRA is used.
FULL_PARAMETERS = 5e8
LORA_RANK = 32
RATE = {"full": 1e-4, "lora": 3e-4}
WARMUP_STEPS = 10
SAVE_S = 60.0
CLIP = 1.0
BATCH = 2
CURVE_PARTS = 40


def heal(
    student: Path,
    teacher: Path,
    state: Path,
    *,
    dataset: str,
    num_samples: int,
    minutes: float,
    max_steps: int | None = None,
) -> dict[str, Any]:
    """Train a pruned checkpoint in place.

    Args:
        student: Pruned checkpoint; its weights are replaced at the end.
        teacher: The original.
        state: Folder for what is needed to continue after an interruption.
        dataset: Training text, see `calibration`.
        num_samples: Samples of it.
        minutes: Time for all runs together, interrupted ones included.
        max_steps: Stop after that many steps; None for no bound but time.

    Returns:
        method, steps, minutes, losses: mean KL of each of about 40 parts of the run.
    """
    import torch

    place = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = load(student, "float32").model.to(place)
    guide = load(teacher).model.to(place)
    ids, _ = calibration.whole_samples(dataset, source_tokenizer.load(teacher), num_samples)
    method = "full" if sum(each.numel() for each in model.parameters()) <= FULL_PARAMETERS else "lora"
    trained = _with_lora(model) if method == "lora" else model
    run = _Run(trained, method, state)
    run.resume()
    while run.seconds < 60 * minutes and (max_steps is None or run.step < max_steps):
        rows = [ids[(run.step * BATCH + row) % len(ids)] for row in range(min(BATCH, len(ids)))]
        run.advance(guide, torch.tensor(rows, device=place))
        emit(Progress(min(run.seconds, 60 * minutes), 60 * minutes))
    run.save()
    final = trained.merge_and_unload() if method == "lora" else model
    final.to("cpu").to(guide.dtype).save_pretrained(student)
    copy_texts(teacher, student)
    return {"method": method, "steps": run.step, "minutes": round(run.seconds / 60, 2), "losses": _curve(run.losses)}


def _with_lora(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    return get_peft_model(model, LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=targets))


class _Run:
    """One training run, over all its interruptions."""

    def __init__(self, model: Any, method: str, folder: Path) -> None:
        import torch

        self.model, self.rate, self.folder = model, RATE[method], folder
        self.weights = [each for each in model.parameters() if each.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights, lr=self.rate, weight_decay=0.0)
        self.step, self.seconds, self.losses = 0, 0.0, list[float]()
        self.saved = 0.0

    def advance(self, guide: Any, batch: Any) -> None:
        """One step."""
        import torch

        started = time.perf_counter()
        with torch.no_grad():
            expected = guide(batch, use_cache=False).logits.float().log_softmax(-1)
        log_q = self.model(batch, use_cache=False).logits.float().log_softmax(-1)
        loss = (expected.exp() * (expected - log_q)).sum(-1).mean()
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * min(1.0, (self.step + 1) / WARMUP_STEPS)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights, CLIP)
        self.optimizer.step()
        self.losses.append(float(loss.detach()))
        self.step += 1
        self.seconds += time.perf_counter() - started
        if self.seconds - self.saved > SAVE_S:
            self.save()

    def save(self) -> None:
        """Write the state, replacing an older one in a single step."""
        import torch

        self.folder.mkdir(parents=True, exist_ok=True)
        content = {"weights": [each.detach() for each in self.weights], "optimizer": self.optimizer.state_dict()}
        record = {"step": self.step, "seconds": self.seconds, "losses": self.losses}
        with replacing(self.folder / "state.pt") as temporary:
            torch.save({**content, "record": json.dumps(record)}, temporary)
        self.saved = self.seconds

    def resume(self) -> None:
        """Continue where an earlier run stopped, if there is one."""
        import torch

        if not (self.folder / "state.pt").exists():
            return
        content = torch.load(self.folder / "state.pt", weights_only=True)
        if [each.shape for each in self.weights] != [each.shape for each in content["weights"]]:
            return  # the state of a model of another shape: start again
        with torch.no_grad():
            for weight, saved in zip(self.weights, content["weights"], strict=True):
                weight.copy_(saved)
        self.optimizer.load_state_dict(content["optimizer"])
        record = json.loads(content["record"])
        self.step, self.seconds, self.losses = record["step"], record["seconds"], record["losses"]
        self.saved = self.seconds


def _curve(losses: list[float]) -> list[float]:
    """Mean loss of each part of the run."""
    size = max(1, len(losses) // CURVE_PARTS)
    parts = [losses[start : start + size] for start in range(0, len(losses), size)]
    return [round(sum(part) / len(part), 4) for part in parts if len(part) == size]
