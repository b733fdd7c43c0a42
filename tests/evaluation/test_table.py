"""Results as a table and as a plot."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from ov_afm.errors import ConfigError
from ov_afm.evaluation import table
from ov_afm.evaluation.divergence import Interval, Scores, summarize
from ov_afm.evaluation.fidelity import Fidelity


def fidelity(model: str, size: int, divergence: float) -> Fidelity:
    near = Interval(divergence, 0.9 * divergence, 1.2 * divergence)
    figures = summarize(
        [Scores(*(np.ones(9, dtype=np.float32) for _ in range(3)), np.ones(9, dtype=bool)) for _ in range(2)]
    )
    figures = dataclasses.replace(figures, kl_mean=near)
    runtime = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    return Fidelity(model, "int4", "whole", size, 1_000_000, "t.txt", 18, 2, 0.9, runtime, figures)


def test_table_has_one_row_a_model_smallest_first() -> None:
    rows = table.fidelity_table([fidelity("large", 900_000, 0.0123), fidelity("small", 500_000, 0.5)]).splitlines()
    assert [row.split(" | ")[0].strip("| ") for row in rows[2:]] == ["small", "large"]
    assert "| 500.0 kB | 4.00 | 0.500 (0.450–0.600) |" in rows[2]
    assert "0.0123 (0.0111–0.0148)" in rows[3]


def test_plot_names_every_model_but_the_reference(tmp_path: Path) -> None:
    results = [fidelity("half", 500_000, 0.5), fidelity("full", 900_000, 0.01), fidelity("itself", 4_000_000, 4e-8)]
    table.plot(results, tmp_path / "p.svg")
    drawn = (tmp_path / "p.svg").read_text()
    assert "half" in drawn
    assert "full" in drawn
    assert "itself" not in drawn
    table.plot(results, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.png", "p.svg"]
    with pytest.raises(ConfigError, match="nothing to draw: no model differs from the reference") as caught:
        table.plot(results[2:], tmp_path / "p.svg")
    assert caught.value.code == "plot-empty"


@pytest.mark.parametrize("suffix", table.FORMATS)
def test_plot_replaces_plots_of_ov_afm_alone(tmp_path: Path, suffix: str) -> None:
    from matplotlib.figure import Figure

    path = tmp_path / f"size-kl{suffix}"
    table.check_format(path)
    table.save(Figure(), path)
    table.check_format(path)
    Figure().savefig(path)
    mine = path.read_bytes()
    with pytest.raises(ConfigError, match="exists and is not a plot of ov_afm") as caught:
        table.check_format(path)
    assert caught.value.code == "output-foreign"
    assert path.read_bytes() == mine
