"""benchmarks/figures.py: every figure in the documents comes from a record, with its CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import benchmarks

from ov_afm.bench.statistics import Spread
from ov_afm.errors import ConfigError
from ov_afm.model_dir.model_directory import ModelDirectory

figures, records = benchmarks.load("figures"), benchmarks.load("records")
LAPTOP = {
    "name": "Laptop",
    "family": "6",
    "model": "183",
    "features": ["AVX2", "AVX-VNNI"],
    "cores": 8,
    "threads": 8,
    "isa": "avx2vnni",
    "limit": None,
}
MODEL = {
    "name": "afm-4.5b",
    "synthetic": True,
    "geometry": {},
    "recipe": "int4",
    "weights": "INT4 g128 + INT8 per row",
    "weights_bytes": 2_700_000_000,
    "bits_per_weight": 4.68,
}


def figure(times: float, *, kind: str = "decode", what: str = "decode", peer: str = "OpenVINO GenAI") -> Any:
    around = Spread(times, times * 0.9, times * 1.1, 3)
    return records.Figure(kind, what, "ms", peer, Spread(100, 90, 110, 3), Spread(100 * times, 80, 300, 3), around)


def record(*measured: Any, day: int = 1, cpu: dict[str, Any] = LAPTOP, program: str = "relu2.py") -> Any:
    return records.Record(
        program,
        f"python benchmarks/{program} MODEL",
        f"2026-12-{day:02}T00:00:00Z",
        "abc1234",
        {"openvino": "2026.4.1"},
        cpu,
        MODEL,
        list(measured),
    )


def test_documents_say_what_the_records_say() -> None:
    recorded = records.read(records.FOLDER)
    again = "run: python benchmarks/figures.py"
    assert (records.ROOT / "docs" / "speed.md").read_text(encoding="utf-8") == figures.page(recorded), again
    readme = (records.ROOT / "README.md").read_text(encoding="utf-8")
    assert readme == figures.with_table(readme, figures.short(recorded)), again


def test_each_cpu_is_a_column_and_a_loss_is_bold() -> None:
    server = {**LAPTOP, "name": "Server", "isa": "amx"}
    limited = {**server, "isa": "avx2vnni", "limit": "avx2vnni"}
    prefill = figure(0.8, kind="prefill", what="prefill of 256 tokens")
    text = figures.page([record(prefill, figure(1.7)), record(figure(2.5), cpu=server), record(prefill, cpu=limited)])
    assert text.split("###")[0].splitlines()[-3:-1] == [
        "| decode | OpenVINO GenAI | 1.70× (1.53–1.87) | 2.50× (2.25–2.75) | – |",
        "| prefill of 256 tokens | OpenVINO GenAI | **0.800× (0.720–0.880)** | – | **0.800× (0.720–0.880)** |",
    ]
    for title in ("Laptop, 8 threads, `avx2vnni` kernels", "Server, 8 threads, limited to `avx2vnni`"):
        assert f"### {title}\n" in text
    assert "All engines were limited to `avx2vnni`" in text.split("### Server, 8 threads, limited")[1]


def test_the_newest_record_of_a_figure_counts() -> None:
    later, other = record(figure(0.9), day=2), record(figure(3.0, what="other"), day=1)
    text = figures.page([record(figure(2.0)), other, later])
    assert "| decode | OpenVINO GenAI | **0.900× (0.810–0.990)** |" in text
    assert "2.00×" not in text
    assert "3.00×" in text
    assert "2026-12-02; commit abc1234; OpenVINO 2026.4.1; `int4` 2.70 GB, 4.68 bits a weight" in text


def test_readme_has_the_main_model_and_each_comparison_once() -> None:
    small = replace(record(figure(9.0)), model={**MODEL, "name": "small"})
    peers = record(figure(8.0), figure(7.0, peer="llama.cpp, Q4_0"), program="peers.py")
    table = figures.short([record(figure(1.7)), small, peers])
    assert [number in table for number in ("1.70×", "9.00×", "8.00×", "7.00×")] == [True, False, False, True]
    marked = f"before\n{figures.BEGIN}\nold\n{figures.END}\nafter\n"
    assert figures.with_table(marked, table) == f"before\n{figures.BEGIN}\n\n{table}\n\n{figures.END}\nafter\n"
    with pytest.raises(ConfigError, match="needs two lines"):
        figures.with_table("no marks", table)


def test_records_are_kept_apart_and_a_damaged_one_is_named(tiny_model: Path, tmp_path: Path) -> None:
    written = [records.save(record(figure(times)), tmp_path) for times in (1.0, 2.0)]
    assert [path.name for path in written] == ["2026-12-01-relu2-1.json", "2026-12-01-relu2-2.json"]
    assert records.read(tmp_path) == [record(figure(1.0)), record(figure(2.0))]
    made = records.new_record(ModelDirectory.open(tiny_model), records.describe_cpu(2, "avx2"), [figure(1.0)])
    assert made.model["weights"] == "INT8 per row"
    assert made.cpu["name"]
    for text in ("{", "[]", "{}", '{"schema": 99}', '{"schema": 1, "figures": [{"kind": "wish"}]}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ConfigError, match="bad.json is no record"):
            records.read(tmp_path)
