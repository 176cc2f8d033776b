"""Records, and the README's table, of a GPU check: python -m bench.gpu_records FOLDER

So that what was measured on one machine can be committed from another.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from bench import records
from bench.chart import figure, percent
from bench.history import Result
from bench.report import write

Line = dict[str, Any]
Record = dict[str, Any]

ROOT = Path(__file__).resolve().parents[1]
LINES = "check.jsonl"
BEGIN, END = "<!-- make report writes from here -->\n", "<!-- to here -->\n"
FIELDS = ("params", "hash", *records.SILENT)  # that a line and a record share


def read(path: Path) -> list[Line]:
    """The lines of a check; the first is about all of it. A line that was cut short is left out.

    Raises: ValueError: it is not the file of a check.
    """
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError):
            lines.append(json.loads(text))
    if not lines or "check" not in lines[0]:
        raise ValueError(f"{path} is not the file of a check; want {LINES}, as make gpu-check writes it")
    return lines


def of(lines: Sequence[Line]) -> list[Record]:
    """A record for each result and for each stage; of tests that passed there is only the number."""
    about, told = lines[0], {line["name"]: line for line in lines[1:]}
    machine, ceilings = (dict(told.get(name, {}).get("facts", {})) for name in ("machine", "ceilings"))
    machine["driver"] = told.get("machine", {}).get("watch", {}).get("driver")
    common = {
        "schema": records.SCHEMA, "run": about["run"], "ceilings": ceilings.get("ceilings", {}),
        "ceilings_invalid": [], "device": records.device_name(machine), "scale": machine.pop("scale", "unknown"),
        "machine": machine, "commit": about["commit"], "dirty": about["dirty"],
    }  # fmt: skip
    tests = {stage: Counter(outcomes) for stage, outcomes in _outcomes(lines).items()}
    found = []
    for line in lines[1:]:
        stage, name = line["stage"], line["name"]
        if "::" in name and line["outcome"] != "failed":
            continue
        record = common | {"params": {}, "hash": ""} | records.SILENT
        record |= {field: line[field] for field in ("time", "outcome", "reason", *FIELDS) if field in line}
        record |= {"case": f"gpu_check.py::{stage.replace(' ', '_')}", "name": f"{stage}: {name}" if name else stage}
        if not name:
            record["facts"] = {"seconds": line["seconds"], "results": dict(tests[stage])}
        record["shares"] = _shares(record)
        found.append(record)
    return found


def _outcomes(lines: Iterable[Line]) -> dict[str, list[str]]:
    """{stage: the outcome of each of its results}"""
    found: dict[str, list[str]] = {}
    for line in lines:
        if "stage" in line:
            found.setdefault(line["stage"], []).extend([line["outcome"]] * bool(line["name"]))
    return found


def _shares(record: Record) -> dict[str, dict[str, float]]:
    ceilings, seconds = record["ceilings"], Result(record).median
    done = (("GB/s", record["bytes"] / 1e9, "copy"), ("TFLOP/s", record["flops"] / 1e12, record["precision"]))
    return {
        unit: {"rate": amount / seconds, "share": amount / seconds / ceilings[name]}
        for unit, amount, name in done
        if amount and record["samples_s"] and name in ceilings
    }


def keep(found: Sequence[Record], results: Path) -> Path:
    """Write a file of records, under the name that a run of the benchmarks would have given it.

    Raises: ValueError: there is another file of that name; records are never overwritten.
    """
    first = found[0]
    stem = f"{first['run'].replace(':', '')}-{(first['commit'] or 'unknown')[:7]}-check"
    path = results / first["device"] / f"{stem}.jsonl"
    text = "".join(json.dumps(record) + "\n" for record in found)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise ValueError(f"{path} exists with other records, and records are never overwritten; move it away")
    write(path, text)
    return path


# The README


def table(found: Sequence[Record]) -> str:
    """Milliseconds per step of each engine, in Markdown."""
    steps = {
        tuple(record["params"].values()): Result(record) for record in found if "cudnn_benchmark" in record["params"]
    }
    rivals = {record["name"].partition(": ")[2]: Result(record) for record in found if "::diffusers" in record["case"]}
    first, machine = found[0], found[0]["machine"]
    rows = []
    for batch in sorted({batch for batch, _, _ in steps}):
        timed = [steps.get((batch, *how)) for how in (("eager", False), ("graph", False), ("graph", True))]
        timed.insert(0, rivals.get(f"batch {batch}, diffusers eager bf16"))
        best = min((result for result in timed[2:] if result and result.timed), key=lambda r: r.median, default=None)
        share = best and best.record["shares"].get("TFLOP/s")
        cells = [figure(1e3 * result.median) if result and result.timed else "–" for result in timed]
        rows.append(
            [str(batch), *cells, figure(best.images) if best else "–", percent(share["share"]) if share else "–"]
        )
    ceilings = first["ceilings"]
    rates = f"copy {figure(ceilings.get('copy', 0))} GB/s, bf16 product {figure(ceilings.get('bf16', 0))} TFLOP/s"
    head = ["batch", "diffusers", "eager", "graph", "graph, `cudnn.benchmark`", "images/s", "of the bf16 product"]
    about = (
        f"Measured on one {machine['gpu']} (torch {machine['torch']}, {first['run'][:10]}, commit "
        f"{Result(first).commit}; ceilings: {rates}): milliseconds per step of the cifar10-32 layout in bf16; images/s "
        "are of 1000 steps by the faster graph."
    )
    lines = [about, "", *(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))]
    return "\n".join(lines) + "\n"


def put(text: str, readme: Path) -> None:
    """Put the table between the marks of the README.

    Raises: ValueError: it has no such marks.
    """
    whole = readme.read_text(encoding="utf-8")
    before, begin, rest = whole.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{readme} has no lines {BEGIN.strip()} and {END.strip()} to put the table between")
    write(readme, before + begin + text + end + after)


# The command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_records", description=__doc__.partition("\n")[0])
    parser.add_argument("folder", metavar="FOLDER", type=Path, help=f"of a check: it holds {LINES}")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help="of records (%(default)s)")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="for the table of a GPU (%(default)s)")
    args = parser.parse_args(argv)
    try:
        found = of(read(args.folder / LINES))
        print(keep(found, args.results))
        if found[0]["scale"] == "cuda":
            put(table(found), args.readme)
            print(args.readme)
    except (ValueError, OSError) as error:
        parser.exit(2, f"bench.gpu_records: error: {error}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
