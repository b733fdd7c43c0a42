"""Records of a comparison → a Markdown table, and one HTML page with plots that needs no other file."""

from __future__ import annotations

import html
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ..runtime.metrics import Spread
from .recommendation import recommend
from .records import Record
from .summary import Summary, number, summarize

__all__ = ["HTML_NAME", "MARKDOWN_NAME", "markdown", "page", "summarize", "write"]

HTML_NAME = "report.html"
MARKDOWN_NAME = "report.md"
HEADINGS = (
    "model",
    "device",
    "option",
    "prompt",
    "requests",
    "load s",
    "first inference s",
    "TTFT ms",
    "TPOT p50 / p95 ms",
    "decode tokens/s",
    "of ceiling",
    "prefill tokens/s",
    "total tokens/s",
    "peak memory GB",
    "energy J/token",
    "note",
)
# Columns of text, which are left-aligned: the first three and the note.
TEXT_COLUMNS = (0, 1, 2, len(HEADINGS) - 1)
ABSENT = "–"


def write(folder: Path, records: Sequence[Record], *, interrupted: bool = False) -> None:
    """Write `report.md` and `report.html`, each in one step.

    Args:
        folder: The report folder.
        records: What was measured; with no measured run only the Markdown table is meaningful.
        interrupted: The sweep was ended early, which both say.
    """
    for name, text in (
        (MARKDOWN_NAME, markdown(records, interrupted=interrupted) + "\n"),
        (HTML_NAME, page(records, interrupted=interrupted)),
    ):
        temporary = folder / f".{name}.{os.getpid()}"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(folder / name)


def markdown(records: Iterable[Record], *, interrupted: bool = False) -> str:
    """The comparison as Markdown: recommendation, table, and what the figures mean."""
    summaries = summarize(records)
    if not summaries:
        return "Nothing was measured."
    lines = [*(["**Interrupted: this is a part of the sweep.**", ""] if interrupted else [])]
    lines += [*(f"{line}\n" for line in recommend(summaries))]
    rules = ["---" if index in TEXT_COLUMNS else "---:" for index in range(len(HEADINGS))]
    lines += [f"| {' | '.join(HEADINGS)} |", f"|{'|'.join(rules)}|"]
    lines += [f"| {' | '.join(_cells(each))} |" for each in summaries if each.runs]
    lines += [
        f"| {' | '.join([*cells, *[ABSENT] * (len(HEADINGS) - 6), f'**not run:** {reason}'])} |"
        for cells, reason in _not_run(summaries)
    ]
    lines += ["", *_notes(summaries)]
    return "\n".join(lines)


def _cells(summary: Summary) -> list[str]:
    row, figures = summary.combination, summary.figures
    option = f"{row.option}, kernels" if summary.get("kernels") else row.option
    cells = [row.model, summary.device, option, str(row.prompt_tokens), str(row.concurrency)]
    load, first = summary.get("load_s"), summary.get("first_inference_s")
    percentiles = [figures.get("tpot_p50_ms"), figures.get("tpot_p95_ms")]
    share = summary.ceiling_share
    ttft = _range(figures.get("ttft_ms"))
    repeated = figures.get("ttft_repeated_ms")
    return [
        *cells,
        f"{load:.1f}",
        f"{first:.2f}",
        ttft if repeated is None else f"{ttft}, repeated {repeated.median:.0f}",
        " / ".join(ABSENT if each is None else f"{each.median:.1f}" for each in percentiles),
        _range(figures.get("decode_tokens_per_s")),
        ABSENT if share is None else f"{share:.0%} of {summary.ceiling:.1f}",
        _range(figures.get("prefill_tokens_per_s")),
        _range(figures.get("total_tokens_per_s")),
        _memory(figures),
        _range(figures.get("energy_per_token_j")),
        f"after {summary.runs} runs: {summary.reason}" if summary.reason else "",
    ]


def _not_run(summaries: Sequence[Summary]) -> list[tuple[list[str], str]]:
    """What could not run: the first five cells and the reason, one row for all of a device that share it."""
    found: dict[tuple[str, str, str], list[Summary]] = {}
    for each in summaries:
        if not each.runs:
            found.setdefault((each.combination.model, each.device, each.reason or ""), []).append(each)
    rows = []
    for (model, device, reason), group in found.items():
        values = [
            (each.combination.option, each.combination.prompt_tokens, each.combination.concurrency) for each in group
        ]
        cells = [", ".join(dict.fromkeys(str(value[index]) for value in values)) for index in range(3)]
        rows.append(([model, device, *cells], reason))
    return rows


def _memory(figures: Mapping[str, Spread]) -> str:
    device = figures.get("device_memory_bytes")
    text = _range(figures.get("peak_rss_bytes"), 1e9)
    return text if device is None else f"{text} + {number(device.most / 1e9)} on device"


def _range(found: Spread | None, scale: float = 1) -> str:
    """Median with the least and the most."""
    if found is None:
        return ABSENT
    values = [number(each / scale) for each in (found.median, found.least, found.most)]
    return values[0] if found.runs == 1 or values[1] == values[2] else f"{values[0]} ({values[1]}–{values[2]})"


def _notes(summaries: Sequence[Summary]) -> list[str]:
    head = next((each.head for each in summaries if each.runs), summaries[0].head)
    machine, versions = head["machine"], head["versions"]
    bandwidth = head.get("bandwidth_bytes_per_s")
    notes = [
        f"Medians of up to {head['runs_asked']} runs (least–most); {head['prompts']} prompts, each used once; "
        "warm-up not counted; greedy decoding past any end of text.",
        f"Machine: {machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / 1e9:.0f} GB, "
        f"{machine['system']}. Versions: {', '.join(f'{name} {version}' for name, version in versions.items())}.",
    ]
    if bandwidth:
        notes.append(
            f"Ceiling: memory reads at {bandwidth / 1e9:.1f} GB/s with {head['bandwidth_threads']} threads, "
            "measured before the sweep; a token reads its weights and KV cache once. More than 100% means "
            "that weights were skipped or that the caches hold the model."
        )
    sources = {str(each.get("energy_source")) for each in summaries if each.get("energy_source")}
    if any("energy_per_token_j" in each.figures for each in summaries):
        sources.add("idle power subtracted, decoding only")
    notes.append(f"Energy: {'; '.join(sorted(sources)) or 'not measured'}.")
    if any(each.combination.concurrency > 1 for each in summaries if each.runs):
        notes.append("With several requests TTFT is that of the one that waits longest, TPOT that of all tokens.")
    if any(each.emulated for each in summaries):
        notes.append(
            "Emulated NPU: the NPU's path run on the CPU, to try limits and shapes. Its speed is not an NPU's and is "
            "in no plot."
        )
    if any(each.get("synthetic") for each in summaries):
        notes.append("Synthetic weights: speed and memory are those of the geometry, the words are noise.")
    notes.append(f"Command: `{head['command']}`")
    return [line for note in notes for line in (note, "")][:-1]


def page(records: Iterable[Record], *, interrupted: bool = False) -> str:
    """The comparison as one HTML page."""
    from . import plots as report_plots

    summaries = summarize(records)
    plots = "\n".join(
        f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>"
        for svg, caption in report_plots.draw(summaries)
    )
    if not any("energy_per_token_j" in each.figures for each in summaries):
        source = next(
            (str(each.get("energy_source")) for each in summaries if each.get("energy_source")), "not measured"
        )
        plots += f"<figure><b>Energy of a token</b><figcaption>{html.escape(source)}</figcaption></figure>"
    head = "".join(f"<th{_align(index)}>{html.escape(each)}</th>" for index, each in enumerate(HEADINGS))
    rows = "\n".join([*(_html_row(each) for each in summaries if each.runs), *map(_html_absent, _not_run(summaries))])
    notes = "\n".join(f"<p>{_code(note)}</p>" for note in _notes(summaries) if note) if summaries else ""
    advice = "\n".join(f"<p>{html.escape(line)}</p>" for line in recommend(summaries))
    warning = "<p class=warning>Interrupted: this is a part of the sweep.</p>" if interrupted else ""
    return PAGE.format(warning=warning, advice=advice, plots=plots, head=head, rows=rows, notes=notes)


def _align(index: int) -> str:
    return "" if index in TEXT_COLUMNS else " class=n"


def _html_row(summary: Summary) -> str:
    cells = "".join(f"<td{_align(index)}>{html.escape(each)}</td>" for index, each in enumerate(_cells(summary)))
    return f"<tr>{cells}</tr>"


def _html_absent(row: tuple[list[str], str]) -> str:
    cells = "".join(f"<td{_align(index)}>{html.escape(each)}</td>" for index, each in enumerate(row[0]))
    return f"<tr class=absent>{cells}<td colspan={len(HEADINGS) - 5}>not run: {html.escape(row[1])}</td></tr>"


def _code(text: str) -> str:
    """Escaped text; what stands in backticks becomes code."""
    parts = html.escape(text).split("`")
    return "".join(f"<code>{part}</code>" if index % 2 else part for index, part in enumerate(parts))


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>ov-afm: comparison of devices and precisions</title>
<link rel="icon" href="data:,">
<style>
:root {{ --ink: #1b1f24; --soft: #57606a; --line: #d0d7de; --back: #ffffff; --card: #f6f8fa; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e6edf3; --soft: #9aa5b1; --line: #373e47; --back: #14181d; --card: #1c2128; }}
}}
body {{ margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: var(--ink); background: var(--back);
  font: 16px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }}
.advice {{ background: var(--card); border-left: 4px solid #2f81d6; padding: .3rem 1rem; }}
.warning {{ color: #d1403f; font-weight: 600; }}
.plots {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 32rem), 1fr)); gap: 1rem;
  align-items: start; }}
figure {{ margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .8rem; }}
figure svg {{ width: 100%; height: auto; color: var(--ink); display: block; }}
figcaption, .notes {{ color: var(--soft); font-size: 14px; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 14px; white-space: nowrap; }}
th, td {{ border-bottom: 1px solid var(--line); padding: .35rem .6rem; text-align: left; }}
.n {{ text-align: right; font-variant-numeric: tabular-nums; }}
.absent td {{ color: var(--soft); white-space: normal; }}
code {{ overflow-wrap: anywhere; }}
</style>
</head>
<body>
<h1>Which device, which precision?</h1>
{warning}
<section class="advice">{advice}</section>
<h2>Plots</h2>
<div class="plots">
{plots}
</div>
<h2>All figures</h2>
<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>
{rows}
</tbody></table></div>
<section class="notes">{notes}</section>
</body>
</html>
"""
