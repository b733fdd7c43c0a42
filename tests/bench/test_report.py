"""The report: a table, a recommendation by its stated rule, and one page that a browser shows whole."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ov_afm.bench import report
from ov_afm.bench.recommendation import RULE, recommend
from ov_afm.bench.statistics import summarize

RUNS = 3


def row(device: str = "CPU", speed: float = 10.0, memory: float = 3e9, **fields: Any) -> list[dict[str, Any]]:
    """Records of one invented combination: three runs, 2% apart."""
    base = {
        "schema": 1,
        "status": "ok",
        "model": "int4",
        "device": device,
        "option": "plain",
        "prompt_tokens": 256,
        "new_tokens": 128,
        "concurrency": 1,
        "emulated": device == "NPU-EMULATED",
        "synthetic": False,
        "kl_mean": None,
        "model_bytes": 2.5e9,
        "load_s": 4.0,
        "first_inference_s": 15.0,
        "energy_source": "not available: this machine shows no RAPL energy counter",
        "ttft_ms": 5000.0,
        "tpot_ms": 1000 / speed,
        "tpot_p50_ms": 1000 / speed,
        "tpot_p95_ms": 1100 / speed,
        "prefill_tokens_per_s": 50.0,
        "total_tokens_per_s": speed / 2,
        "peak_rss_bytes": memory,
        "ceiling_tokens_per_s": None if device != "CPU" else 20.0,
        "bandwidth_bytes_per_s": 40e9,
        "bandwidth_threads": 4,
        "runs_asked": RUNS,
        "prompts": "text",
        "command": "ov-afm bench 'a <b>'",
        "versions": {"openvino": "2026.4.1"},
        "machine": {"cpu": "An <Intel> processor", "cores": 4, "memory_bytes": 16e9, "system": "Linux"},
    }
    return [{**base, "run": run, "decode_tokens_per_s": speed * (1 + run / 100), **fields} for run in range(RUNS)]


def blocked(device: str, reason: str, **fields: Any) -> list[dict[str, Any]]:
    return [{**row(device, **fields)[0], "status": "cannot run", "reason": reason}]


EVERYTHING = [
    *row(),
    *row(prompt_tokens=1024, speed=9.0, ttft_ms=21000.0),
    *row(model="int8", speed=6.0, memory=5e9, energy_per_token_j=2.5, energy_source="RAPL package-0"),
    *row(model="int8", speed=5.0, memory=5e9, prompt_tokens=1024),
    *row("GPU", speed=14.0),
    *row("GPU", speed=13.0, prompt_tokens=1024),
    *row("NPU-EMULATED", speed=99.0),
    *row(option="prompt-lookup", speed=17.0),
    *row(concurrency=4, total_tokens_per_s=22.0, decode_tokens_per_s=None),
    *blocked("NPU", "NPU cannot run recipe 'int8' & needs int4", model="int8"),
    *blocked("NPU", "NPU cannot run recipe 'int8' & needs int4", model="int8", prompt_tokens=1024),
]


def advice(records: list[dict[str, Any]]) -> str:
    return "\n".join(recommend(summarize(records)))


def test_fastest_device_is_recommended_with_the_rule() -> None:
    said = advice(EVERYTHING)
    assert said.startswith("Use int4 · GPU: 13.6 tokens/s, first token after 5.0 s for a prompt of 1024 tokens")
    assert "int4 · CPU 9.6 tokens/s; int8 · CPU 5.6 tokens/s" in said
    assert said.endswith(RULE)


def test_of_equally_fast_ones_the_smaller_is_recommended() -> None:
    said = advice([*row(speed=10.0, memory=3e9), *row(model="int8", speed=10.4, memory=5e9)])
    assert said.startswith("Use int4 · CPU: 10.1 tokens/s")
    assert "int8 · CPU is as fast (10.5) and needs 5.00 GB" in said


def test_overlapping_runs_count_as_equally_fast() -> None:
    noisy = row(model="int8", speed=12.0, memory=5e9)
    noisy[0]["decode_tokens_per_s"] = 9.0
    assert advice([*row(speed=10.0, memory=3e9), *noisy]).startswith("Use int4 · CPU")


def test_emulation_is_never_recommended() -> None:
    assert "emulated" not in advice([*row(speed=1.0), *row("NPU-EMULATED", speed=99.0)]).replace(RULE, "")
    assert advice(row("NPU-EMULATED")).startswith("No recommendation: no real device was measured")


def test_series_are_compared_over_common_prompt_lengths_only() -> None:
    said = advice([*row(speed=10.0), *row(prompt_tokens=4096, speed=1.0), *row("GPU", speed=9.0)])
    assert said.startswith("Use int4 · CPU: 10.1 tokens/s")


def test_option_is_told_as_a_gain_only_beyond_noise() -> None:
    assert "prompt-lookup on int4 · CPU: 1.70× decode speed at 256 tokens" in advice(EVERYTHING)
    assert "prompt-lookup on int4 · CPU: no change beyond noise at 256 tokens" in advice(
        [*row(), *row(option="prompt-lookup", speed=10.1)]
    )


def test_quality_stands_beside_speed_where_export_measured_it() -> None:
    said = advice([*row(kl_mean=0.05), *row(model="int8", speed=6.0, kl_mean=0.001)])
    assert "(0 is the same): int8 0.001, int4 0.05." in said


def test_table_has_medians_with_ranges_ceiling_and_reasons() -> None:
    text = report.markdown(EVERYTHING)
    line = next(line for line in text.splitlines() if line.startswith("| int4 | CPU | plain | 256 | 1 |"))
    assert "| 10.1 (10.0–10.2) | 50% of 20.0 |" in line
    assert text.count("**not run:** NPU cannot run recipe 'int8' & needs int4") == 1
    assert "| int8 | NPU | plain | 256, 1024 | 1 |" in text
    assert "| int4 | emulated NPU | plain |" in text
    assert "Its speed is not an NPU's and is in no plot" in text
    assert "not available: this machine shows no RAPL energy counter" in text


def test_nothing_measured_says_so() -> None:
    assert report.markdown([]) == "Nothing was measured."
    assert "No recommendation" in report.page(blocked("NPU", "not here"))


def test_page_needs_no_other_file_and_escapes_what_it_shows() -> None:
    page = report.page(EVERYTHING)
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    assert "An &lt;Intel&gt; processor" in page
    assert "a &lt;b&gt;" in page


def test_absent_energy_sensor_is_told_in_place_of_a_plot() -> None:
    page = report.page(row())
    assert "<b>Energy of a token</b><figcaption>not available: this machine shows no RAPL" in page
    assert "<b>Energy of a token</b>" not in report.page(EVERYTHING)


def test_emulation_is_in_no_plot() -> None:
    plots = "".join(re.findall(r"<svg.*?</svg>", report.page(EVERYTHING), re.DOTALL))
    assert "int4 · GPU" in plots
    assert "emulated" not in plots.lower()
    assert "NPU" not in plots


PROBE = """
<script>
window.addEventListener("load", () => {
  const found = [...document.querySelectorAll("figure svg")].map(svg => {
    const box = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll("text")].filter(t => t.textContent.trim()).map(t => {
      const r = t.getBoundingClientRect();
      return {text: t.textContent.trim(), height: r.height, colour: getComputedStyle(t).fill,
              inside: r.left >= box.left - 1 && r.right <= box.right + 1 && r.top >= box.top - 1
                      && r.bottom <= box.bottom + 1};
    });
    return {label: svg.getAttribute("aria-label"), width: box.width, height: box.height,
            paths: svg.querySelectorAll("path").length, texts};
  });
  const report = {plots: found, back: getComputedStyle(document.body).backgroundColor,
                  broken: [...document.images].filter(i => !i.naturalWidth).length,
                  overflow: document.documentElement.scrollWidth - innerWidth};
  document.body.innerHTML = "<pre id=probe></pre>";
  document.getElementById("probe").textContent = JSON.stringify(report);
});
</script>
"""


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_browser_draws_every_plot_with_legible_text(scheme: str, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here")
    path = tmp_path / "report.html"
    path.write_text(report.page(EVERYTHING).replace("</body>", PROBE + "</body>"), encoding="utf-8")
    dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1280,2400", "--enable-logging=stderr"]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    shown = subprocess.run(
        [browser, *options, *dark, profile, "--dump-dom", path.as_uri()], capture_output=True, timeout=120, check=True
    )
    assert b"CONSOLE" not in shown.stderr
    text = re.search(r'<pre id="probe">(.*)</pre>', shown.stdout.decode(), re.DOTALL)
    assert text is not None
    found = json.loads(text[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert found["broken"] == 0
    assert found["overflow"] <= 0
    assert [plot["label"] for plot in found["plots"]] == [
        "Time to first token against prompt length; whiskers from the fastest run to the slowest.",
        "Decode speed, one request, prompt of 1024 tokens; whiskers from the slowest run to the fastest."
        " Dashed: what memory bandwidth allows a dense model at best.",
        "Most resident memory of the process at any prompt length; dashed: size of the weights on disk.",
        "Energy of a decoded token, prompt of 256 tokens, idle power subtracted; read from RAPL package-0.",
        "Throughput of continuous batching, prompts of 256 tokens, prefill included.",
        "Decode speed by engine option, one request, prompt of 256 tokens.",
    ]
    for plot in found["plots"]:
        assert plot["width"] > 400
        assert plot["height"] > 100
        assert plot["paths"] > 5
        assert len(plot["texts"]) >= 4
        for each in plot["texts"]:
            assert each["inside"], each
            # Rotated labels are measured along the other side; none is smaller than small print.
            assert each["height"] >= 9, each
            assert contrast(each["colour"], found["back"]) >= 4.5, each


def contrast(one: str, other: str) -> float:
    """WCAG 2 contrast ratio of two CSS colours."""

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)
