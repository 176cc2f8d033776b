"""The HTML page of all records: its numbers, its axes, and how a browser shows it."""

import json
import math
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import median
from threading import Thread
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("pytest_benchmark")  # bench needs it

from bench import records, report, report_parts
from bench.chart import BYTES, SECONDS, Markup, figure, linear, logarithmic, percent, quantity, tag

ROOT = Path(__file__).parents[2]

# Records like those of the benchmarks

EVIL = "<script>document.title = 'evil'</script><img src=x onerror=alert(1)>\ud800 & \"quoted\""
H200 = {
    "gpu": "NVIDIA H200", "driver": "570.124.06", "gpu_memory_gb": 150.1, "l2_mb": 62.9, "cpu": "Intel Xeon 8480C",
    "threads": 16, "python": "3.12.9", "torch": "2.11.0+cu128", "triton": "3.6.0", "cuda": "12.8", "cudnn": 91002,
    "diffusers": "0.38.0",
}  # fmt: skip
XEON = dict.fromkeys(H200) | {"cpu": "Intel(R) Xeon(R) Processor", "threads": 2, "python": "3.11.7", "torch": "2.13.0"}
CEILINGS = {
    "nvidia-h200": {"copy": 4310.0, "fp32": 51.6, "tf32": 401.0, "bf16": 792.0, "fp16": 788.0},
    "xeon-2-threads": {"copy": 21.4, "fp32": 0.172, "bf16": 1.31, "fp16": 0.0042},
}
SPEEDS = {  # share of the ceiling
    "fastddpm graph bf16": 0.53, "fastddpm eager bf16": 0.36, "fastddpm graph tf32": 0.5, "reference eager fp32": 0.31,
    "diffusers compiled bf16": 0.24, "diffusers eager bf16": 0.14, "diffusers eager fp32": 0.09,
}  # fmt: skip
NO_WATCH = dict.fromkeys(("nvml", "clock_sm_mhz", "power_w", "temperature_c", "memory_used_gb", "throttle", "energy_j"))
WATCH = NO_WATCH | {
    "clock_sm_mhz": {"min": 1700, "median": 1755, "max": 1980}, "temperature_c": {"min": 40, "median": 55, "max": 61},
    "power_w": {"min": 300.0, "median": 641.2, "max": 700.0}, "memory_used_gb": 12.5, "energy_j": 812.0,
    "throttle": {"SW power cap": 0.12},
}  # fmt: skip


def record(**fields):
    """Return a record that passed."""
    plain = {
        "schema": 1, "run": "2026-11-22T21:00:00Z", "time": "2026-11-22T21:03:00Z", "params": {}, "hash": "a1b2c3",
        "case": "test_kernels.py::test_step", "name": "test_step[a]", "group": None, "contender": None,
        "outcome": "passed", "reason": None, "invalid": [], "samples_s": [0.001, 0.002, 0.004], "calls": 20,
        "clock": "wall", "cache": "hot", "bytes": 0, "flops": 0, "precision": None, "images": 0, "shares": {},
        "errors": None, "facts": {}, "ceilings": CEILINGS["xeon-2-threads"], "device": "xeon-2-threads", "scale": "cpu",
        "machine": XEON, "watch": {}, "commit": "abcdef0" + 33 * "1", "dirty": False,
    }  # fmt: skip
    return plain | fields


def failed(why, **fields):
    """Return the record of a failed case."""
    nothing = {"samples_s": [], "shares": {}, "group": None, "contender": None}
    return record(**fields) | {"outcome": "failed", "reason": why} | nothing


def cases(device):
    """Return {(case, name): (share of the ceilings, fields of all its records)}."""
    gpu, found = device == "nvidia-h200", {}
    for batch in (1, 64, 21846) if gpu else (1, 64):
        for who, share in (("fastddpm", 0.91), ("reference", 0.22), ("diffusers", 0.11)):
            about = {"group": f"step, {batch} x 3 x 32 x 32, fp32", "contender": who, "bytes": 49152 * batch}
            about["errors"] = {"bits": "equal"} if who == "fastddpm" else None
            found["test_kernels.py::test_step", f"test_step[{who} step-fp32-({batch}, 3, 32, 32)]"] = share, about
    found["test_kernels.py::test_hot", "test_hot[fastddpm step-(64, 3, 32, 32)]"] = 1.8, {"bytes": 2359296}
    for batch in (1, 64) if gpu else (1,):
        for who, share in SPEEDS.items():
            if not gpu and ("graph" in who or "compiled" in who):
                continue
            about = {
                "contender": who, "precision": "tf32" if who == "diffusers eager fp32" and gpu else who.split()[-1],
                "flops": 12_440_000_000 * batch, "bytes": 71_000_000 + 34_000_000 * batch,
                "errors": {"max": {"error": 0.0119, "bound": 0.0375}, "rms": {"error": 1.2e-3, "bound": 4.1e-3}},
                "facts": {"prepare_s": 1.23, "energy_per_image_j": 21.4, "steps": 1000},
            }  # fmt: skip
            share *= 0.1 if batch == 1 and gpu else 1
            layout = f"cifar10-32-{batch}-{who}"
            pass_, loop = (
                about | {"group": f"{work}, cifar10-32, batch {batch}"} for work in ("U-Net forward", "sampling")
            )
            found["test_unet.py::test_forward", f"test_forward[{layout}]"] = share, pass_
            found["test_sampling.py::test_steps", f"test_steps[{layout}]"] = share, loop | {"images": batch / 1000}
    found["test_start.py::test_first_image", "test_first_image[warm]"] = None, {"samples_s": [4.21, 4.19, 4.3]}
    facts = {"peak_bytes": 3.1e8, "held_bytes": {"weights": 71.2e6, "activations": 210.5e6}}
    found["test_memory.py::test_memory", "test_memory[bf16-1-eager]"] = None, {"facts": facts, "samples_s": []}
    return found


def timed(fields, share, ceilings, noise):
    """Return samples and shares of a case that runs at this share of the nearer ceiling."""
    amounts = {"GB/s": (fields.get("bytes", 0) / 1e9, ceilings["copy"])}
    amounts["TFLOP/s"] = fields.get("flops", 0) / 1e12, ceilings.get(fields.get("precision"), 1)
    seconds = max(amount / ceiling for amount, ceiling in amounts.values()) / share
    samples = [seconds * (1 + abs(noise())) for _ in range(20)]
    rates = {unit: (amount / median(samples), ceiling) for unit, (amount, ceiling) in amounts.items() if amount}
    return samples, {unit: {"rate": rate, "share": rate / ceiling} for unit, (rate, ceiling) in rates.items()}


def synthetic(folder, commits=12):
    """Write records of two devices with everything that may happen to a case."""
    rng = random.Random(0)
    hashes = [f"{rng.getrandbits(160):040x}" for _ in range(commits)]
    for device, machine in (("nvidia-h200", H200), ("xeon-2-threads", XEON)):
        gpu, ceilings, lines = device == "nvidia-h200", CEILINGS[device], []
        for number, commit in enumerate(hashes):
            last = number == commits - 1
            run = f"2026-{number // 3 + 8:02}-{7 * (number % 3) + 3:02}T21:00:00Z"
            about = {"run": run, "time": run, "device": device, "machine": machine, "ceilings": ceilings}
            about |= {"commit": commit, "dirty": last, "scale": "cuda" if gpu else "cpu", "watch": NO_WATCH}
            about |= {"watch": WATCH} if gpu else {}
            faster = 1.35 if number < 3 else 1.12 if number < 7 else 1
            for at, ((case, name), (share, fields)) in enumerate(cases(device).items()):
                if "first_image" in name and not last:
                    continue  # it is new
                line = record(case=case, name=name) | about | fields
                line["hash"] = f"{at:06x}{'b' * 6 if number >= 5 and at % 4 == 0 else 'a' * 6}"
                if share:
                    share /= faster if "fastddpm" in name else 1
                    noise = partial(rng.gauss, 0, 0.005 if at % 3 else 0.02)
                    line["samples_s"], line["shares"] = timed(fields, share, ceilings, noise)
                if (number, at % 7) == (6, 3):
                    line["invalid"] = ["throttled: SW thermal slowdown in 12 % of the samples"]
                if (number, at % 9) == (8, 4):
                    line = failed(f"1 of 840 elements differ {EVIL}", **line)
                if last and at == 5:
                    line["invalid"] = ["shared: 2 other processes on the GPU"]
                if last and at == 14:
                    line = failed("max error is 0.0812, twice plain torch's 0.0375", **line)
                if last and at == 7:
                    line = failed("--seconds are over", **line) | {"outcome": "skipped"}
                lines.append(line)
        write(folder / device / "all.jsonl", lines)
    return folder


def write(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


# Numbers


@pytest.mark.parametrize(
    ("text", "want"),
    [
        (figure(0.01234), "0.0123"),
        (figure(4.5), "4.50"),
        (figure(999.6), "1,000"),
        (figure(1234567, 4), "1,235,000"),
        (figure(1.2e-7, 2), "1.2e-7"),
        (figure(-3.14159), "-3.14"),
        (figure(0), "0"),
        (quantity(0.004521, SECONDS), "4.52 ms"),
        (quantity(0.00099996, SECONDS), "1.00 ms"),
        (quantity(123.4e-6, SECONDS, 4), "123.4 µs"),
        (quantity(3e-10, SECONDS), "0.300 ns"),
        (quantity(321, SECONDS), "321 s"),
        (quantity(3.1e8, BYTES), "310 MB"),
        (percent(1.084), "108 %"),
        (percent(0.0421), "4.2 %"),
        (percent(0.00999), "1.0 %"),
        (percent(0.0037), "0.37 %"),
        (percent(1e-6), "<0.01 %"),
        (linear(0.00095, 0.0013).labels(SECONDS), ["0.9 ms", "1.0 ms", "1.1 ms", "1.2 ms", "1.3 ms"]),
        (logarithmic(3e-4, 4e-2, 4).labels(SECONDS), ["100 µs", "1 ms", "10 ms", "100 ms"]),
    ],
)
def test_numbers_are_short(text, want):
    assert text == want


# Axes

AMOUNTS = st.floats(1e-12, 1e12)


@given(low=AMOUNTS, width=st.floats(1e-3, 1e6), most=st.integers(3, 9))
def test_linear_axis_has_a_few_round_ticks_around_the_values(low, width, most):
    high = low * (1 + width)
    scale = linear(low, high, most)
    steps = [after - before for before, after in zip(scale.ticks, scale.ticks[1:], strict=False)]
    assert 2 <= len(scale.ticks) <= most
    assert steps == pytest.approx([steps[0]] * len(steps), rel=1e-6)
    mantissa = float(f"{steps[0]:.6e}".partition("e")[0])
    assert mantissa in (1, 2, 5)
    assert -1e-6 <= scale.at(low) <= scale.at(high) <= 1 + 1e-6
    assert [scale.at(scale.ticks[0]), scale.at(scale.ticks[-1])] == [0, 1]
    assert scale.at((scale.ticks[0] + scale.ticks[-1]) / 2) == pytest.approx(0.5)
    assert len(set(scale.labels())) == len(scale.ticks) or low < 1e-6  # twelve decimals


@given(low=AMOUNTS, width=st.floats(0, 1e12), most=st.integers(3, 9))
def test_logarithmic_axis_has_a_few_round_ticks_around_the_values(low, width, most):
    high = low * (1 + width)
    scale = logarithmic(low, high, most)
    assert 2 <= len(scale.ticks) <= most
    assert list(scale.ticks) == sorted(scale.ticks)
    assert {f"{tick:.9e}".partition(".")[0] for tick in scale.ticks} <= {"1", "2", "5"}
    assert -1e-6 <= scale.at(low) <= scale.at(high) <= 1 + 1e-6
    assert [scale.at(scale.ticks[0]), scale.at(scale.ticks[-1])] == [0, 1]
    assert scale.at(math.sqrt(scale.ticks[0] * scale.ticks[-1])) == pytest.approx(0.5)


@given(low=st.floats(1e-6, 1e6), high=st.floats(1e-6, 1e6), log=st.booleans())
def test_labels_of_an_axis_are_its_ticks(low, high, log):
    scale = (logarithmic if log else linear)(min(low, high), max(low, high))
    assert [float(label.replace(",", "")) for label in scale.labels()] == pytest.approx(
        scale.ticks, rel=1e-5, abs=1e-12
    )


@pytest.mark.parametrize("value", [0, 1, 5e-3])
def test_axis_of_one_value_has_a_width(value):
    for high in (value, value * (1 + 1e-15)):
        ticks = linear(value, high).ticks
        assert ticks[0] <= value <= high <= ticks[-1]
        assert len(set(ticks)) == len(ticks) > 1
    assert not value or logarithmic(value, value).ticks[0] <= value < logarithmic(value, value).ticks[-1]


# Markup


class Reader(HTMLParser):
    """The tags, which must be closed in order, and the text of a page."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, name, attributes):
        self.tags.append((name, dict(attributes)))
        if name not in ("meta", "link", "input"):
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, text):
        self.text.append(text)

    def with_class(self, kind):
        return [about for _, about in self.tags if kind in (about.get("class") or "").split()]


def read(*found):
    return Reader(report.page(list(found)))


def test_all_text_is_escaped():
    assert (
        tag("p", "<b>", Markup("<i></i>"), None, class_='"', data_case=None) == '<p class="&quot;">&lt;b&gt;<i></i></p>'
    )
    names = ("case", "name", "group", "contender", "reason", "hash", "clock", "cache", "precision", "device", "commit")
    evil = dict.fromkeys(names, EVIL) | {"invalid": [EVIL], "facts": {EVIL: EVIL}, "machine": {EVIL: EVIL, "gpu": EVIL}}
    evil |= {"watch": {"throttle": {EVIL: 0.5}}, "errors": {EVIL: EVIL}, "ceilings": {EVIL: 1.0, "copy": 1.0}}
    evil |= {"shares": {EVIL: {"rate": 1.0, "share": 0.5}}, "bytes": 5, "flops": 5}
    fine = {"invalid": []}
    found = read(*(record(**evil | more) for more in (fine, {"name": "b"}, {"outcome": "failed"}, {"scale": EVIL})))
    names = Counter(name for name, _ in found.tags)
    assert names["script"] == 1
    assert names["img"] == 0
    assert not any(name.startswith("on") for _, about in found.tags for name in about)
    assert sum("onerror" in text for text in found.text) > 10


# How the page shows records


def marks(found):
    """Return the kinds of the points of all histories and rooflines."""
    return [about["class"] for about in found.with_class("mark") if "data-case" not in about][3:]  # the legend's


def lines(found):
    """Return the number of points that each line of the histories joins."""
    return [about["d"].count(" ") for about in found.with_class("line") if "roof" not in about["class"]][1:]


def runs(*changes, **fields):
    """Return the records of one case, one run a month."""
    return [record(run=f"2026-{month:02}-01T00:00:00Z", **fields | change) for month, change in enumerate(changes, 1)]


@pytest.mark.parametrize(
    ("changes", "joined"),
    [
        ([{}] * 5, [5]),
        ([{"hash": "a"}, {"hash": "a"}, {"hash": "b"}, {"hash": "b"}, {"hash": "b"}], [2, 3]),
        ([{"hash": "a"}, {"hash": "b"}, {"hash": "a"}, {"hash": "a"}], [2]),
        ([{}, {"invalid": ["throttled"]}, {}, {}], [3]),
        ([{}, {"outcome": "failed", "samples_s": []}, {}], [2]),
        ([{}], []),
    ],
)
def test_line_breaks_where_the_case_changed(changes, joined):
    found = read(*runs(*changes))
    assert lines(found) == joined
    hashes = [change.get("hash") for change in changes]
    assert len(found.with_class("changed")) - 1 == sum(map(str.__ne__, map(str, hashes), map(str, hashes[1:])))
    assert len(marks(found)) == len(changes)


def test_points_show_the_outcome_of_a_run():
    changes = {}, {"invalid": ["throttled: hot"]}, {"outcome": "failed", "samples_s": [], "reason": "it is wrong"}
    found = read(*runs(*changes, {"outcome": "skipped", "samples_s": [], "reason": "no time"}, {"samples_s": []}))
    assert marks(found) == ["mark ours passed", "mark ours invalid", "mark ours failed"]
    text = "".join(found.text)
    assert "failed: it is wrong" in text
    assert "invalid: throttled: hot" in text
    assert "skipped: no time" in text


def test_failed_case_keeps_its_group_and_contender():
    about = {"group": "a step", "contender": "diffusers eager fp32"}
    first, second = runs(about, {})
    found = read(first, failed("it is wrong", **second))
    assert marks(found) == ["mark other passed", "mark other failed"]
    assert "diffusers eager fp32" in found.text


def test_runs_of_one_commit_are_separate_points():
    found = read(*runs({"dirty": True}, {"dirty": False}, {"commit": None, "dirty": None}))
    assert len(marks(found)) == 3
    assert {"abcdef0*", "abcdef0", "unknown"} <= set(found.text)


def test_long_history_is_cut():
    found = read(*(record(run=f"2026-01-01T00:{n // 60:02}:{n % 60:02}Z") for n in range(70)))
    assert len(marks(found)) == report_parts.LONGEST


def test_devices_and_scales_are_separate():
    gpu = {"device": "nvidia-h200", "scale": "cuda", "machine": H200}
    found = read(record(), record(scale="tiny"), record(name="test_step[b]", **gpu))
    assert len(found.with_class("device")) == 3
    places = [found.text.index(name) for name in ("NVIDIA H200", f"{XEON['cpu']}, 2 threads")]
    assert places == sorted(places), "a GPU comes first"
    assert f"{XEON['cpu']}, 2 threads (tiny sizes)" in found.text
    assert len(found.with_class("plot")) == 3


def contenders(run, **times):
    """Return the records of a group in one run."""
    return [
        record(
            run=run, name=f"test_step[{who}]", contender=who.replace("_", " "), group="a step", samples_s=[seconds] * 3
        )
        for who, seconds in times.items()
    ]


def rows_of_the_race(found):
    race = r"((?:fastddpm|diffusers|reference)[\w ]*)\|([\d.]+ [mM][sB])(?:\|(our[\w ]* [\d.]+ ×(?: as fast)?))?"
    return re.findall(race, "|".join(found.text))


def test_contenders_of_one_run_are_compared():
    old = contenders("2026-01-01T00:00:00Z", fastddpm=0.001, diffusers=0.001, reference=0.004)
    new = contenders("2026-02-01T00:00:00Z", fastddpm=0.002, fastddpm_eager=0.003, diffusers=0.005)
    found = read(*old, *new)
    assert rows_of_the_race(found)[:3] == [
        ("fastddpm", "2.00 ms", ""),
        ("fastddpm eager", "3.00 ms", ""),
        ("diffusers", "5.00 ms", "ours is 2.50 × as fast"),
    ]
    assert "fastddpm is 2.50 × as fast as diffusers, the fastest other" in "".join(found.text)


def test_invalid_contender_is_not_the_fastest():
    found = contenders("2026-01-01T00:00:00Z", fastddpm=0.001, fastddpm_eager=0.002, diffusers=0.001, reference=0.004)
    for one in (found[0], found[2]):
        one["invalid"] = ["throttled"]
    page = read(*found)
    assert "fastddpm eager is 2.00 × as fast as reference, the fastest other" in "".join(page.text)
    assert [text for text in page.text if text.endswith(" × as fast")] == ["our eager is 2.00 × as fast"]


def test_roofline_shows_valid_medians():
    work = {"flops": 6e9, "bytes": 3e6}
    found = read(
        record(**work),
        record(**work, name="b", invalid=["throttled"]),
        failed("wrong", **work, name="c"),
        record(name="d"),
    )
    points = [about["data-case"] for about in found.with_class("mark") if "data-case" in about]
    assert points == ["test_kernels.py::test_step test_step[a]"]
    assert any(text.startswith("test_step[a]\n3.00 TFLOP/s at 2,000 FLOP/byte\n") for text in found.text)


def test_peak_memory_is_compared():
    found = contenders("2026-01-01T00:00:00Z", fastddpm=1, diffusers=1)
    for one, peak in zip(found, (2e8, 4e8), strict=True):
        one.update(samples_s=[], facts={"peak_bytes": peak})
    page = read(*found)
    assert rows_of_the_race(page)[:2] == [("fastddpm", "200 MB", ""), ("diffusers", "400 MB", "ours takes 0.500 ×")]
    assert "fastddpm takes 0.500 × the memory of diffusers, the smallest other: 50 % less" in "".join(page.text)
    assert [about["width"] for about in page.with_class("fill")] == ["50.0%", "100.0%"]


def test_comparison_uses_the_latest_run_with_both_sides():
    both = contenders("2026-01-01T00:00:00Z", fastddpm_eager_fp32=0.005, diffusers_eager_fp32=0.004)
    page = read(*both, *contenders("2026-02-01T00:00:00Z", fastddpm_eager_fp32=0.001))
    assert rows_of_the_race(page)[0] == ("diffusers eager fp32", "4.00 ms", "our eager fp32 is 0.800 × as fast")
    assert page.with_class("slower")
    assert "fastddpm eager fp32 is 0.800 × as fast as diffusers eager fp32" in "".join(page.text)


def test_contender_is_compared_with_the_same_engine_and_precision():
    times = {"fastddpm_eager_bf16": 0.001, "fastddpm_eager_fp32": 0.002, "diffusers_eager_fp32": 0.003}
    page = read(*contenders("2026-01-01T00:00:00Z", **times))
    assert rows_of_the_race(page)[2] == ("diffusers eager fp32", "3.00 ms", "our eager fp32 is 1.50 × as fast")
    assert "fastddpm eager bf16 is 3.00 × as fast as diffusers eager fp32" in "".join(page.text)


def test_unreliable_ceilings_are_reported():
    assert "unreliable: throttled" not in "".join(read(record()).text)
    work = {"flops": 6e9, "bytes": 3e6, "shares": {"GB/s": {"rate": 1.5, "share": 0.07}}}
    text = "".join(read(record(ceilings_invalid=["throttled"], **work)).text)
    assert text.count("The ceilings of this run are unreliable: throttled.") == 3


def test_tiles_count_the_latest_result_of_every_case():
    old, new = "2026-01-01T00:00:00Z", "2026-02-01T00:00:00Z"
    page = read(
        failed("wrong", run=old, name="old"),
        record(run=old, name="mended") | {"outcome": "failed", "samples_s": []},
        record(run=new, name="mended"),
        record(run=new),
        failed("bad", run=new, name="new"),
        record(run=new, name="b", invalid=["throttled"]),
        record(run=new, name="c", outcome="skipped", samples_s=[]),
    )
    text = "|".join(page.text)
    assert "cases|6|failed|2|invalid|1|skipped|1|" in text
    assert "not in the latest run; failed: wrong" in page.text
    assert "|old| failed: wrong (abcdef0, 2026-01-01 00:00 UTC)|" in text
    assert "|new| failed: bad|" in text


def test_headings_count_all_records():
    found = [*runs({}, {}), record(run="2026-03-01T00:00:00Z", name="b"), record(scale="tiny")]
    text = "|".join(read(*found).text)
    assert "|4 records of 4 runs, the latest of 2026-11-22 21:00 UTC|" in text
    assert "|3 records of 3 runs, the latest of abcdef0 on 2026-03-01 00:00 UTC|" in text
    assert "|1 record of 1 run, the latest of abcdef0 on 2026-11-22 21:00 UTC|" in text


def test_history_of_one_or_two_points_is_folded():
    found = read(
        *runs({}, {}, {}, {"outcome": "skipped", "samples_s": []}),
        *runs({}, {}, {"outcome": "skipped", "samples_s": []}, name="b"),
        record(name="c"),
    )
    text = [text for text in found.text if text.startswith("test_kernels.py, ")]
    assert text[:2] == ["test_kernels.py, 1 case, 3 results", "test_kernels.py, 2 cases, 3 results"]
    states = ["open" in about for about in found.with_class("group")]
    assert states == [True, False, True, False, False]  # the histories; the latest of each case, all runs, all medians
    assert len(marks(found)) == 6


def test_first_image_has_no_rate():
    kinds = {"sampling": ["2.00"], "first image of a process": []}
    for group, want in kinds.items():
        page = read(record(group=group, images=0.004))
        row = page.text[page.text.index("test_step[a]", page.text.index("FLOP/byte")) :]
        assert [text for text in row if text == "2.00"] == want


def test_roofline_shows_one_run():
    work, old = {"flops": 6e9, "bytes": 3e6}, "2026-01-01T00:00:00Z"
    page = read(record(run=old, name="b", **work), record(**work), record(run="2026-12-01T00:00:00Z", name="c"))
    assert [about["data-case"].split()[-1] for about in page.with_class("mark") if "data-case" in about] == [
        "test_step[a]"
    ]
    assert "has a valid time" in "".join(read(record(invalid=["hot"], **work)).text)


def test_lists_of_parts_are_shown_as_medians():
    page = read(record(facts={"parts_s": [{"load": 1.0}, {"load": 2.0}, {"load": 4.0}]}))
    assert "parts, medians: load 2.00 s" in page.text


def test_single_contender_is_not_compared():
    assert not read(*contenders("2026-01-01T00:00:00Z", fastddpm=0.001)).with_class("race")


def test_older_run_of_a_comparison_is_named():
    old = contenders("2026-01-01T00:00:00Z", fastddpm=0.001, diffusers=0.001)
    assert "abcdef0, 2026-01-01 00:00 UTC" in read(*old, record(run="2026-03-01T00:00:00Z")).text


@pytest.mark.parametrize(
    "found",
    [
        [record(samples_s=[0.001])],
        [record(samples_s=[])],
        [record(samples_s=[], facts={"peak_bytes": 1e9, "held_bytes": {"weights": 1e6}})],
        [record(samples_s=[], facts={"peak_bytes": None})],
        [failed("it is wrong")],
        [record(outcome="skipped", samples_s=[], reason="no GPU")],
        [record(ceilings={}, machine={}, commit=None, dirty=None, bytes=1, flops=1)],
        [record(ceilings={"copy": 0, "bf16": -1.0}, bytes=1, flops=1)],
        [record(ceilings={"copy": 1e-3, "bf16": 1e6}, bytes=1, flops=1)],
        [record(ceilings={"copy": 1e6, "bf16": 1e-6}, bytes=1e9, flops=1)],
        [record(watch=NO_WATCH), record(watch={"clock_sm_mhz": "fast", "throttle": []}, name="b")],
        [record(errors={"max": {"error": None, "bound": 1.0}, "bits": "equal", "rms": 3})],
        [record(facts={"a": None, "b": [1], "c": {"d": {}}, "e_s": True, "": 1, "f_j": 3, "g": float("nan")})],
        [record(samples_s=[1e-9]), record(samples_s=[1e3], run="2026-11-23T21:00:00Z")],
        [failed("it is wrong", name="b", group="g"), record(group="g")],
    ],
)
def test_every_record_makes_a_page(found):
    assert read(*found).with_class("device")


def test_tables_show_all_numbers():
    errors = {"max": {"error": 1.2e-7, "bound": 3e-7}, "bits": "equal"}
    facts = {"prepare_s": 1.234, "held_bytes": {"weights": 5e6}, "steps": 20, "note": "fine", "energy_per_image_j": 2.5}
    shares = {"GB/s": {"rate": 12.3, "share": 0.45}, "TFLOP/s": {"rate": 0.678, "share": 0.089}}
    about = {"errors": errors, "facts": facts, "shares": shares, "watch": WATCH, "bytes": 100, "flops": 5000}
    found = read(record(**about, images=0.001, clock="cuda events", cache="cold", precision="bf16"))
    want = ["2.000 ms", "1.500 ms – 3.000 ms", "3 × 20", "12.3", "45 %", "0.678", "8.9 %", "0.500", "50.0"]
    want += ["cuda events, cold, bf16", "max 1.2e-7 of 3.0e-7, bits equal"]
    want += ["1,760 MHz, 641 W, 61.0 °C, 12.5 GB, 812 J, SW power cap 12 %"]
    want += ["prepare 1.23 s; held: weights 5.00 MB; steps 20.00; note fine; energy per image 2.50 J"]
    assert [text for text in want if text not in found.text] == []


# The command


def command(*arguments):
    run = [sys.executable, "-m", "bench.report", *map(str, arguments)]
    return subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=False)


def test_command_writes_a_page_and_prints_its_path(tmp_path):
    file = write(tmp_path / "one/run.jsonl", [record()])
    file.write_text(file.read_text() + '{"schema": 1, "run')
    done = command(tmp_path, "--out", tmp_path / "new/page.html")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/new/page.html\n")
    assert done.stderr.startswith(f"bench.report: {file}, line 2: skipped")
    assert done.stderr.count("\n") == 1
    assert Reader((tmp_path / "new/page.html").read_text("utf-8")).with_class("device")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["page.html"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["empty"], "no records in "),
        (["missing"], "missing does not exist"),
        (["one", "--out", "empty"], "empty is a folder; want a file"),
        (["--frob"], "unrecognized arguments: --frob"),
    ],
)
def test_error_is_one_line(arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write(tmp_path / "one/run.jsonl", [record()])
    with pytest.raises(SystemExit) as stopped:
        report.main(arguments)
    out, err = capsys.readouterr()
    assert (stopped.value.code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("bench.report: error: ")
    assert says in err


def test_records_of_this_checkout_are_the_default(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    write(tmp_path / "one/run.jsonl", [record()])
    assert report.main([]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/report.html\n"


def test_page_is_written_completely_or_not_at_all(tmp_path, monkeypatch):
    page = tmp_path / "page.html"
    page.write_text("the last one")

    def broken(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(Path, "replace", broken)
    with pytest.raises(OSError, match="the disk is full"):
        report.write(page, "a new one")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["the last one"]


# In a browser

FLAGS = (
    "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
    "disable-component-update", "disable-sync",
)  # fmt: skip
PLOT = """
const center = (element) => {
  const box = element.getBoundingClientRect();
  return [box.left + box.width / 2, box.top + box.height / 2];
};
const places = (kind) => [...arguments[0].querySelectorAll(kind)].map((element) => [
  element.textContent, ...center(element), element.dataset.tip ?? element.querySelector("title")?.textContent,
]);
return {x: places("text.x"), y: places("text.y"), marks: places(".mark:not(text)")};
"""
# of all text that is seen: itself, its size, how far right it ends, and its contrast with what is behind it
TEXTS = """
const parse = (color) => color.match(/[\\d.]+/g).map(Number);
const light = (color) => {
  const [r, g, b] = parse(color).map((c) => c / 255).map((c) => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4);
  return .2126 * r + .7152 * g + .0722 * b;
};
const behind = (element) => {
  for (; element; element = element.parentElement) {
    const color = getComputedStyle(element).backgroundColor;
    if ((parse(color)[3] ?? 1) > 0) return color;
  }
};
document.querySelectorAll("details").forEach((details) => { details.open = true; });
const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const text = walker.currentNode, element = text.parentElement, style = getComputedStyle(element);
  if (!text.data.trim() || element.closest("title, script")) continue;
  if (!element.checkVisibility({visibilityProperty: true})) continue;
  const color = element instanceof SVGElement ? style.fill : style.color;
  const [dark, bright] = [light(color), light(behind(element))].sort((one, other) => one - other);
  const range = document.createRange();
  range.selectNodeContents(text);
  const right = element.closest(".scroll") ? 0 : range.getBoundingClientRect().right;
  found.push([text.data, parseFloat(style.fontSize), right, (bright + .05) / (dark + .05)]);
}
return found;
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A served page of synthetic records: its address, its records, and the paths that were requested."""
    folder, asked = tmp_path_factory.mktemp("site"), []
    synthetic(folder / "records")
    assert report.main([str(folder / "records"), "--out", str(folder / "report.html")]) == 0

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            asked.append(self.path)

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/report.html"
        yield SimpleNamespace(address=address, asked=asked, records=records.read([folder / "records"]))
        server.shutdown()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.service import Service

    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not browser or not driver:
        pytest.skip("chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (*FLAGS, f"user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(f"--{flag}")
    browser = webdriver.Chrome(options=options, service=Service(executable_path=driver))
    yield browser
    browser.quit()


@pytest.fixture
def visit(chromium, site):
    """visit(width, scheme, script=True): the browser, showing the page that way."""
    from selenium.webdriver.support.wait import WebDriverWait

    def visited(width=1280, scheme="light", *, script=True):
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        chromium.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not script})
        chromium.get_log("browser")  # what was logged before
        chromium.get(site.address)
        complete = "return document.readyState === 'complete'"  # on a busy machine get() may return before
        WebDriverWait(chromium, 60, 0.05).until(lambda browser: browser.execute_script(complete))
        return chromium

    return visited


def axis(labels, along):
    """Return a function from values to pixels, from two labels; `along` is math.log10 for a logarithmic axis."""
    number = lambda text: (
        float(text.split()[0].replace(",", "")) * dict(map(reversed, SECONDS)).get(text.split()[-1], 1)
    )
    (first, low), (second, high) = [(along(number(label[0])), label[1]) for label in (labels[0], labels[-1])]
    return lambda value: low + (along(value) - first) / (second - first) * (high - low)


def test_positions_of_points_of_a_history(visit, site):
    browser, name = visit(), "test_steps[cifar10-32-64-fastddpm graph bf16]"
    plot = browser.find_element("css selector", f"svg.plot[aria-label^='{name}: ']")
    found = browser.execute_script(PLOT, plot)
    own = [one for one in site.records if one["name"] == name and one["device"] == "nvidia-h200"]
    passed = [one for one in own if one["outcome"] == "passed"]
    assert len(found["marks"]) == len(passed) > 9
    y = axis([(text, down) for text, _, down, _ in found["y"]], lambda value: value)
    for (_, _, down, tip), one in zip(found["marks"], passed, strict=True):
        seconds = median(one["samples_s"])
        assert down == pytest.approx(y(seconds), abs=1)
        assert tip.startswith(f"{1e3 * seconds:.3f} ms\nquartiles ")
        assert one["commit"][:7] in tip
    commits = {f"{one['commit'][:7]}{'*' * one['dirty']}" for one in own}
    places = {text: across for text, across, _, _ in found["x"]}
    assert places.keys() <= commits
    for across, tip in ((across, tip) for _, across, _, tip in found["marks"]):
        commit = re.search(r"^([0-9a-f]{7}\*?),", tip, re.MULTILINE)[1]
        assert across == pytest.approx(places.get(commit, across), abs=1)


def test_positions_of_points_of_a_roofline(visit, site):
    browser = visit()
    found = browser.execute_script(PLOT, browser.find_element("css selector", ".roofline svg.plot"))
    x = axis([(text, across) for text, across, _, _ in found["x"]], math.log10)
    y = axis([(text, down) for text, _, down, _ in found["y"]], math.log10)
    latest = {
        one["name"]: one for one in site.records if one["device"] == "nvidia-h200" and one["outcome"] != "skipped"
    }
    work = [one for one in latest.values() if one["flops"] and one["samples_s"] and not one["invalid"]]
    assert {tip.partition("\n")[0] for *_, tip in found["marks"]} == {one["name"] for one in work}
    assert len(found["marks"]) == len(work) > 20
    for _, across, down, tip in found["marks"]:
        one = latest[tip.partition("\n")[0]]
        assert across == pytest.approx(x(one["flops"] / one["bytes"]), abs=1)
        assert down == pytest.approx(y(one["flops"] / median(one["samples_s"]) / 1e12), abs=1)


def test_tooltip_shows_the_value_of_a_point(visit):
    from selenium.webdriver import ActionChains, Keys

    browser = visit()
    plot = browser.find_element("css selector", "svg.plot[aria-label^='test_first_image[warm]: ']")
    browser.execute_script("arguments[0].closest('details').open = true", plot)  # a history of one point is folded
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", plot)
    tip = browser.find_element("id", "tip")
    assert not tip.is_displayed()
    ActionChains(browser).move_to_element(plot.find_element("css selector", ".mark")).perform()
    assert tip.is_displayed()
    assert tip.text.startswith("4.210 s\nquartiles 4.200 s – 4.255 s, 3 rounds\n")
    assert "2026-11-17 21:00 UTC" in tip.text
    ActionChains(browser).move_to_element(browser.find_element("css selector", "nav a")).perform()
    assert not tip.is_displayed()
    many = browser.find_element("css selector", "svg.plot[aria-label^='test_steps[']")
    last = many.get_attribute("aria-label").rpartition(" at ")[2]
    many.send_keys(Keys.END)
    assert last in tip.text
    many.send_keys(Keys.ARROW_LEFT)
    assert tip.is_displayed()
    assert last not in tip.text
    many.send_keys(Keys.ESCAPE)
    assert not tip.is_displayed()


def test_filter_hides_other_cases(visit):
    browser, kinds = visit(), [".cards .card", ".race", ".latest tbody tr", ".shares tbody tr", ".roofline .mark"]
    count = (
        "return arguments[0].map((s) => [...document.querySelectorAll(s)].filter((e) => e.checkVisibility()).length)"
    )
    seen = lambda: browser.execute_script(count, kinds)
    everything, box = seen(), browser.find_element("css selector", "#filter input")
    assert all(everything)
    box.send_keys("First_image warm")
    assert seen() == [2, 0, 4, 0, 0], "for each device a card, and a heading and a row of the table"
    folded = 2
    assert browser.find_element("id", "count").text == f"2 of {everything[0] + folded} cases"
    box.send_keys("\b" * 20)
    assert seen() == everything
    assert browser.find_element("id", "count").text == ""


def test_page_loads_nothing_from_the_network(visit, site):
    site.asked.clear()
    browser = visit()
    assert site.asked == ["/report.html"]
    assert browser.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)") == []
    assert browser.get_log("browser") == []
    assert browser.title == "fastddpm benchmarks", "no reason runs as a script"
    ask = "const done = arguments[0]; fetch('/secret').then(() => done('asked'), () => done('refused'))"
    assert browser.execute_async_script(ask) == "refused"
    assert site.asked == ["/report.html"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_all_text_is_legible(visit, width, scheme):
    browser = visit(width, scheme)
    texts = browser.execute_script(TEXTS)
    assert len(texts) > 5000
    assert [text for text in texts if text[1] < 12] == []
    assert [text for text in texts if text[2] > width] == []
    assert [text for text in texts if not text[3] >= 4.5] == []
    wide, seen = browser.execute_script(
        "const {scrollWidth, clientWidth} = document.documentElement; return [scrollWidth, clientWidth]"
    )
    assert wide == seen


def test_dark_mode_is_dark(visit):
    color = "return getComputedStyle(document.documentElement).backgroundColor"
    light, dark = (
        sum(map(int, re.findall(r"\d+", visit(scheme=scheme).execute_script(color)))) / 3
        for scheme in ("light", "dark")
    )
    assert light > 230
    assert dark < 40


def test_page_is_complete_without_its_script(visit):
    browser = visit(script=False)
    assert browser.find_elements("id", "tip") == []
    assert not browser.find_element("id", "filter").is_displayed()
    for selector, count in (("table.facts", 2), ("table.latest", 2), ("table.race", 10), (".roofline svg.plot", 2)):
        found = browser.find_elements("css selector", selector)
        assert len(found) >= count
        assert all(one.is_displayed() and one.size["width"] > 200 for one in found)
    plot = browser.find_element("css selector", ".cards svg.plot")
    assert plot.size["height"] > 90
    assert plot.find_element("css selector", ".mark title").get_attribute("textContent").count("UTC") == 1
    runs = browser.find_element("css selector", "table.runs")
    assert not runs.is_displayed()
    browser.find_element("xpath", "//summary[contains(., 'All runs')]").click()
    assert runs.is_displayed()
