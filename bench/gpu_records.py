"""Turn the results of a GPU check into records: python -m bench.gpu_records FOLDER

It can run on another machine than the check, such as one with the git repository.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from bench import gpu_results, records
from bench.gpu_results import Line
from bench.history import Record, Result
from bench.report import RESULTS, write

SHARED_FIELDS = ("time", "outcome", "reason", "params", "hash", *records.FIELD_DEFAULTS)  # of a line and its record


def to_records(lines: Sequence[Line]) -> list[Record]:
    """Return a record for each stage, measurement and failed test; other tests are only counted, per stage."""
    check, by_name = lines[0], {line["name"]: line for line in lines[1:]}
    machine, ceilings = (dict(by_name.get(name, {}).get("facts", {})) for name in ("machine", "ceilings"))
    machine["driver"] = by_name.get("machine", {}).get("watch", {}).get("driver")
    common = {
        "schema": records.SCHEMA, "run": check["run"], "ceilings": ceilings.get("ceilings", {}),
        "ceilings_invalid": by_name.get("ceilings", {}).get("invalid", []), "device": records.device_name(machine),
        "scale": machine.pop("scale", "unknown"), "machine": machine, "commit": check["commit"],
        "dirty": check["dirty"], "params": {}, "hash": "",
    }  # fmt: skip
    counts, found = _counts(lines[1:]), []
    for line in lines[1:]:
        stage, name = line["stage"], line["name"]
        if "::" in name and line["outcome"] != "failed":
            continue
        record = common | records.FIELD_DEFAULTS | {field: line[field] for field in SHARED_FIELDS if field in line}
        record |= {"case": f"gpu_check.py::{stage.replace(' ', '_')}", "name": f"{stage}: {name}" if name else stage}
        if not name:
            record["facts"] = {"seconds": line["seconds"], "results": dict(counts.get(stage, {}))}
        found.append(record | {"shares": _shares(record)})
    return found


def _counts(lines: Iterable[Line]) -> dict[str, Counter[str]]:
    """Return {stage: {outcome: how many of its results have it}}."""
    counts: dict[str, Counter[str]] = {}
    for line in lines:
        if line["name"]:
            counts.setdefault(line["stage"], Counter())[line["outcome"]] += 1
    return counts


def _shares(record: Record) -> dict[str, dict[str, float]]:
    ceilings, seconds = record["ceilings"], Result(record).median
    work = (("GB/s", record["bytes"] / 1e9, "copy"), ("TFLOP/s", record["flops"] / 1e12, record["precision"]))
    return {
        unit: {"rate": amount / seconds, "share": amount / seconds / ceilings[name]}
        for unit, amount, name in work
        if amount and record["samples_s"] and name in ceilings
    }


def write_records(found: Sequence[Record], results: Path) -> Path:
    """Write the records to results/<device>/<run>-<commit>-check.jsonl.

    Raises: ValueError: that file exists with other content; records are never overwritten.
    """
    record = found[0]
    name = f"{record['run'].replace(':', '')}-{(record['commit'] or 'unknown')[:7]}-check.jsonl"
    path = results / record["device"] / name
    text = "".join(json.dumps(record) + "\n" for record in found)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise ValueError(f"{path} exists with other records; records are never overwritten: move that file away")
    write(path, text)
    return path


# The command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns: the exit status."""
    text = "Turn the results of a GPU check into records."
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_records", description=text)
    text = f"results of a check, with {gpu_results.FILE} in it"
    parser.add_argument("folder", metavar="FOLDER", type=Path, help=text)
    text = "folder of the benchmark records (default: %(default)s)"
    parser.add_argument("--results", type=Path, default=RESULTS, help=text)
    args = parser.parse_args(argv)
    try:
        found = to_records(gpu_results.read_results(args.folder))
        if not found:
            raise ValueError(f"{args.folder}: no stage of this check has ended, so there is nothing to record")
        print(write_records(found, args.results))
    except (ValueError, OSError) as error:
        parser.exit(2, f"bench.gpu_records: error: {error}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
