"""Make docs/speed.md, and the table of speeds in README.md, from the records in docs/figures.

    python benchmarks/figures.py            # write both
    python benchmarks/figures.py --check    # only say whether they are up to date

`relu2.py --record` and `peers.py --record` add records. Of a figure that was measured several times on a CPU, the
newest record counts, whatever it says.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import records
from program import program
from records import Figure, Record

from ov_afm.bench.statistics import Spread
from ov_afm.conversion.synthetic import GEOMETRIES
from ov_afm.errors import ConfigError
from ov_afm.model_dir.manifest import PACKAGES
from ov_afm.system.atomic import write_text
from ov_afm.system.console import human_bytes, markdown_table

BEGIN, END = "<!-- speed: made by benchmarks/figures.py -->", "<!-- end of speed -->"
# The model whose figures README shows.
SHOWN = ("afm-4.5b", "INT4")
HEAD = """\
# Speed

Made from the records in [figures](figures) by `python benchmarks/figures.py`; do not edit it. Each figure is the median
of several runs with the least and the most. *Times as fast* (or, of memory, *times as small*) compares ov_afm with its
peer run by run, on the same machine and in turns; **below 1**, ov_afm loses. A synthetic model has AFM-4.5B's geometry
and random weights; the share of active neurons is set for the benchmark."""
EMPTY = "Nothing is recorded yet."


@dataclass(frozen=True)
class Measured:
    """A figure with the record it is from."""

    figure: Figure
    record: Record

    @property
    def model(self) -> str:
        """The model, for people."""
        about = self.record.model
        name = _cut_from(about["geometry"]) or about["name"]
        name = name.upper() if name.startswith("afm-") and " " not in name else name
        return f"{name}{' (synthetic)' if about['synthetic'] else ''}, {about['weights']}"

    @property
    def cpu(self) -> str:
        """The CPU, for people, as short as it stays clear."""
        about = self.record.cpu
        kernels = f"`{about['isa']}` kernels" if about["isa"] else "without kernels"
        limited = f"limited to `{about['limit']}`" if about["limit"] else kernels
        return f"{about['name']}, {about['threads']} threads, {limited}"

    @property
    def row(self) -> tuple[int, str, str]:
        """What is compared with what; in this order."""
        return records.KINDS.index(self.figure.kind), self.figure.what, self.figure.peer


def _cut_from(geometry: Mapping[str, Any]) -> str:
    """What a model of fewer layers is called, whatever its folder's name; empty for any other."""
    for name, each in GEOMETRIES.items():
        whole = asdict(each)
        if geometry and {**geometry, "layers": 0}.items() <= {**whole, "layers": 0}.items():
            layers = geometry["layers"]
            return "" if layers == whole["layers"] else f"{layers} of {name.upper()}'s {whole['layers']} layers"
    return ""


def newest(all_records: Iterable[Record]) -> list[Measured]:
    """The figures that count: of each the newest on each CPU and model."""
    latest: dict[tuple[object, ...], Measured] = {}
    for record in all_records:
        for figure in record.figures:
            measured = Measured(figure, record)
            key = (measured.model, measured.cpu, record.program, measured.row)
            latest.pop(key, None)
            latest[key] = measured
    return list(latest.values())


def ratio(value: Spread) -> str:
    """Times as fast, a loss in bold."""
    text = records.times(value)
    return f"**{text}**" if value.median < 1 else text


def overview(measured: Sequence[Measured]) -> str:
    """A row for each comparison, a column for each CPU."""
    cpus = list(dict.fromkeys(each.cpu for each in measured))
    rows: dict[tuple[int, str, str], dict[str, str]] = {}
    for each in measured:
        rows.setdefault(each.row, {})[each.cpu] = ratio(each.figure.ratio)
    ordered = sorted(rows.items(), key=lambda item: item[0][0])
    cells = [[what, peer, *(by_cpu.get(cpu, "–") for cpu in cpus)] for (_, what, peer), by_cpu in ordered]
    return markdown_table(["times as fast", "compared with", *cpus], cells, "llr")


def details(measured: Sequence[Measured]) -> str:
    """Everything that was measured with a model on a CPU, with the commands."""
    ordered = sorted(measured, key=lambda each: each.row[0])
    sources = list({id(each.record): each.record for each in ordered}.values())
    rows = []
    for each in ordered:
        figure = each.figure
        ours = f"{figure.ours.text()} {figure.unit}" + (f", {figure.note}" if figure.note else "")
        theirs = f"{figure.peer}: {figure.theirs.text()} {figure.unit}"
        command = sources.index(each.record) + 1
        rows.append([figure.what, ours, theirs, ratio(figure.ratio), f"[{command}]"])
    table = markdown_table(["", "ov_afm", "compared with", "times as fast", "command"], rows, "lrrrl")
    commands = [f"{i}. `{record.command}`<br>{provenance(record)}" for i, record in enumerate(sources, 1)]
    return f"{hardware(sources[0])}\n\n{table}\n\n" + "\n".join(commands)


def hardware(record: Record) -> str:
    """What the CPU is and has."""
    cpu = record.cpu
    family = f"family {cpu['family']}, model {cpu['model']}" if cpu["family"] else "family not known"
    limit = (
        f" All engines were limited to `{cpu['limit']}`; a CPU that has no more may differ in memory and caches."
        if cpu["limit"]
        else ""
    )
    return f"{cpu['cores']} cores; {family}; {', '.join(cpu['features']) or 'features not known'}.{limit}"


def provenance(record: Record) -> str:
    """When and with what a record was made."""
    versions = record.versions
    model = f"{human_bytes(record.model['weights_bytes'])}, {record.model['bits_per_weight']:.2f} bits a weight"
    parts = [
        record.time[:10],
        f"commit {record.commit or 'not known'}",
        f"OpenVINO {versions.get('openvino')}",
        *(f"{name} {versions[name]}" for name in sorted(set(versions) - set(PACKAGES))),
        f"`{record.model['recipe']}` {model}",
        *([record.settings] if record.settings else []),
    ]
    return "; ".join(parts)


def page(all_records: Sequence[Record]) -> str:
    """The text of docs/speed.md."""
    measured = newest(all_records)
    blocks = [HEAD] if measured else [HEAD, EMPTY]
    for model, of_model in _groups(measured, "model"):
        blocks += [f"## {model}", overview(of_model)]
        for cpu, of_cpu in _groups(of_model, "cpu"):
            blocks += [f"### {cpu}", details(of_cpu)]
    return "\n\n".join(blocks) + "\n"


def short(all_records: Iterable[Record]) -> str:
    """The table of README: the main model alone, and stock OpenVINO as relu2.py measures it."""
    name, weights = SHOWN
    shown = [
        each
        for each in newest(all_records)
        if each.record.model["name"] == name
        and each.record.model["weights"].startswith(weights)
        and (each.record.program == "relu2.py" or not each.figure.peer.startswith("OpenVINO"))
    ]
    return overview(shown) if shown else EMPTY


def with_table(readme: str, table: str) -> str:
    """README with another table between its two marks.

    Raises:
        ConfigError: A mark is missing.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ConfigError(f"README.md needs two lines for the table of speeds: {BEGIN} and {END}")
    return f"{before}{begin}\n\n{table}\n\n{end}{after}"


def _groups(measured: Sequence[Measured], name: str) -> Iterable[tuple[str, list[Measured]]]:
    groups: dict[str, list[Measured]] = {}
    for each in measured:
        groups.setdefault(getattr(each, name), []).append(each)
    return groups.items()


@program
def main() -> int:
    """Write the documents, or compare them with the records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a document is old")
    args = parser.parse_args()
    all_records = records.read(records.FOLDER)
    readme, speed = records.ROOT / "README.md", records.ROOT / "docs" / "speed.md"
    texts = {speed: page(all_records), readme: with_table(readme.read_text(encoding="utf-8"), short(all_records))}
    old = [path for path, text in texts.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if args.check and old:
        names = ", ".join(path.name for path in old)
        raise ConfigError(f"{names} not as the records say; run: python benchmarks/figures.py")
    for path in old:
        write_text(path, texts[path])
        print(f"{path.relative_to(records.ROOT)} written")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
