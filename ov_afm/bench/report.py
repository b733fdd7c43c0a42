"""Records of a comparison → a Markdown table, and one HTML page with plots that needs no other file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ..system.atomic import write_text
from ..system.console import markdown_table
from .plots import draw
from .recommendation import recommend
from .records import Record
from .statistics import Summary, number, summarize

__all__ = ["HTML_NAME", "MARKDOWN_NAME", "markdown", "page", "write"]

HTML_NAME = "report.html"
MARKDOWN_NAME = "report.md"
TEMPLATE = Path(__file__).with_name("report.html.j2")
ABSENT = "–"


def _text(summary: Summary, figure: str, scale: float = 1) -> str:
    spread = summary.figures.get(figure)
    return ABSENT if spread is None else spread.text(scale)


def _ttft(summary: Summary) -> str:
    repeated = summary.figures.get("ttft_repeated_ms")
    return _text(summary, "ttft_ms") + ("" if repeated is None else f", repeated {repeated.median:.0f}")


def _tpot(summary: Summary) -> str:
    percentiles = [summary.figures.get(name) for name in ("tpot_p50_ms", "tpot_p95_ms")]
    return " / ".join(ABSENT if each is None else f"{each.median:.1f}" for each in percentiles)


def _share(summary: Summary) -> str:
    share = summary.ceiling_share
    return ABSENT if share is None else f"{share:.0%} of {summary.ceiling:.1f}"


def _memory(summary: Summary) -> str:
    device = summary.figures.get("device_memory_bytes")
    on_device = "" if device is None else f" + {number(device.most / 1e9)} on device"
    return _text(summary, "peak_rss_bytes", 1e9) + on_device


# Heading and cell of every column.
COLUMNS: dict[str, Callable[[Summary], str]] = {
    "model": lambda row: row.combination.model,
    "device": lambda row: row.device,
    "option": lambda row: row.combination.option + (", kernels" if row.get("kernels") else ""),
    "prompt": lambda row: str(row.combination.prompt_tokens),
    "requests": lambda row: str(row.combination.concurrency),
    "load s": lambda row: f"{row.get('load_s'):.1f}",
    "first inference s": lambda row: f"{row.get('first_inference_s'):.2f}",
    "TTFT ms": _ttft,
    "TPOT p50 / p95 ms": _tpot,
    "decode tokens/s": lambda row: _text(row, "decode_tokens_per_s"),
    "of ceiling": _share,
    "prefill tokens/s": lambda row: _text(row, "prefill_tokens_per_s"),
    "total tokens/s": lambda row: _text(row, "total_tokens_per_s"),
    "peak memory GB": _memory,
    "energy J/token": lambda row: _text(row, "energy_per_token_j"),
    "note": lambda row: f"after {row.runs} runs: {row.reason}" if row.reason else "",
}
HEADINGS = tuple(COLUMNS)
# Columns of text are left-aligned: the first three and the note.
ALIGN = "lll" + "r" * (len(HEADINGS) - 4) + "l"


def write(folder: Path, records: Sequence[Record], *, interrupted: bool = False) -> None:
    """Write `report.md` and `report.html`, each in one step.

    Args:
        folder: The report folder.
        records: What was measured; with no measured run only the Markdown table is meaningful.
        interrupted: The sweep was ended early, which both say.
    """
    write_text(folder / MARKDOWN_NAME, markdown(records, interrupted=interrupted) + "\n")
    write_text(folder / HTML_NAME, page(records, interrupted=interrupted))


def markdown(records: Iterable[Record], *, interrupted: bool = False) -> str:
    """The comparison as Markdown: recommendation, table, and what the figures mean."""
    summaries = summarize(records)
    if not summaries:
        return "Nothing was measured."
    rows = _measured(summaries)
    for cells, reason in _not_run(summaries):
        rows.append([*cells, *[ABSENT] * (len(HEADINGS) - len(cells) - 1), f"**not run:** {reason}"])
    blocks = ["**Interrupted: this is a part of the sweep.**"] if interrupted else []
    blocks += [*recommend(summaries), markdown_table(HEADINGS, rows, ALIGN)]
    blocks += [*_notes(summaries), f"Command: `{summaries[0].get('command')}`"]
    return "\n\n".join(blocks)


def page(records: Iterable[Record], *, interrupted: bool = False) -> str:
    """The comparison as one HTML page."""
    import jinja2

    summaries = summarize(records)
    sources = [str(each.get("energy_source")) for each in summaries if each.get("energy_source")]
    measured = any("energy_per_token_j" in each.figures for each in summaries)
    template = jinja2.Environment(autoescape=True).from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        interrupted=interrupted,
        advice=recommend(summaries),
        plots=draw(summaries),
        no_energy=None if measured else (sources or ["not measured"])[0],
        headings=HEADINGS,
        align=ALIGN,
        rows=_measured(summaries),
        not_run=_not_run(summaries),
        notes=_notes(summaries),
        command=summaries[0].get("command"),
    )


def _measured(summaries: Sequence[Summary]) -> list[list[str]]:
    return [[cell(each) for cell in COLUMNS.values()] for each in summaries if each.runs]


def _not_run(summaries: Sequence[Summary]) -> list[tuple[list[str], str]]:
    """What could not run: the first five cells and the reason, one row for all of a device that share it."""
    groups: dict[tuple[str, str, str], list[tuple[str, ...]]] = {}
    for each in summaries:
        if not each.runs:
            row = each.combination
            values = (row.option, str(row.prompt_tokens), str(row.concurrency))
            groups.setdefault((row.model, each.device, each.reason or ""), []).append(values)
    return [
        ([model, device, *(", ".join(dict.fromkeys(column)) for column in zip(*rows, strict=True))], reason)
        for (model, device, reason), rows in groups.items()
    ]


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
    return notes
