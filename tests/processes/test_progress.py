"""How a job is told of: rates and times left of made-up counts, bars, lines and logs; failures reach all processes."""

import json
import math
import os
import sys
import threading
import time
from datetime import datetime, timedelta

import pytest

from fastddpm.processes import progress
from fastddpm.processes.distributed import AgreedError, Ranks, ranks
from fastddpm.processes.progress import Count, LostError, Progress
from tests.support.check import error_line
from tests.support.processes import run_ranks


@pytest.fixture(autouse=True)
def often(monkeypatch):
    monkeypatch.setattr(progress, "BEAT", 0.005)


def alone(part=8, *, total=8, before=0, steps=10, **how):
    return Progress(Ranks(), part, **{"total": total, "before": before, "steps": steps, "show": False, **how})


class Clock:
    """time.monotonic that goes as it is told."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_a_summary(clock):
    """Of three processes: one that is done, one in the middle, one ahead of its disk."""
    told = alone(total=100, before=40, steps=10)
    clock.now += 7.1234567
    counts = [
        Count(0, of=10, images=10, steps=50, image_steps=100, seconds=5.0, state="done"),
        Count(1, of=20, images=4, steps=30, image_steps=60, seconds=6.0),
        Count(2, of=30, images=0, steps=40, image_steps=250, seconds=2.0),
    ]
    summary = told.summary(counts)
    when = datetime.fromisoformat(summary.pop("time"))
    assert when.utcoffset() == timedelta(0)
    assert abs(when - datetime.now(when.tzinfo)) < timedelta(minutes=5)
    assert summary.pop("ranks") == [
        {"rank": 0, "state": "done", "images": 10, "of": 10, "drawn": 10}
        | {"images_per_s": 2.0, "steps_per_s": 10.0, "eta_s": 0.0},
        {"rank": 1, "state": "running", "images": 4, "of": 20, "drawn": 6}
        | {"images_per_s": 1.0, "steps_per_s": 5.0, "eta_s": 14.0},
        {"rank": 2, "state": "running", "images": 0, "of": 30, "drawn": 25}
        | {"images_per_s": 12.5, "steps_per_s": 20.0, "eta_s": 0.4},
    ]
    assert summary == {
        "seconds": 7.123,
        "images": 54,
        "of": 100,
        "drawn": 81,
        "images_per_s": 15.5,
        "steps_per_s": 35.0,
        "eta_s": 14.0,  # of the slowest
    }


def test_a_summary_at_the_beginning():
    """No time is known while one has not begun; who has nothing to do has no time left."""
    nothing, begun, idle = Count(0, of=4), Count(1, of=4, steps=5, image_steps=20, seconds=1.0), Count(2, of=0)
    summary = alone().summary([nothing, begun, idle])
    assert summary["eta_s"] is None
    assert [rank["eta_s"] for rank in summary["ranks"]] == [None, 1.0, 0.0]
    assert [rank["images_per_s"] for rank in summary["ranks"]] == [0.0, 2.0, 0.0]
    assert [rank["drawn"] for rank in summary["ranks"]] == [0, 2, 0]
    assert alone().summary([begun, idle])["eta_s"] == 1.0


def test_steps_taken_again_after_out_of_memory_are_not_more_samples():
    summary = alone().summary([Count(0, of=4, images=4, steps=9, image_steps=70, seconds=2.0)])
    assert (summary["drawn"], summary["eta_s"]) == (4, 0.0)


def test_steps_and_samples_are_counted(clock):
    told = alone(part=6, total=9, before=3)
    clock.now += 2
    told.stepped(3, 4)
    clock.now += 1
    told.stepped(2, 1)
    clock.now += 5  # in which nothing was drawn
    told.stored(4)
    told.stored(1)
    assert told.count == Count(0, 6, images=5, steps=5, image_steps=14, seconds=3.0, beat=1)
    told.done()
    (posted,) = told._counts()
    assert posted == told.count == Count(0, 6, images=5, steps=5, image_steps=14, seconds=3.0, state="done", beat=2)


@pytest.fixture
def stderr(monkeypatch, capsys):
    """What is printed; and whether that is a terminal."""

    def told(terminal):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
        return lambda: capsys.readouterr().err

    return told


COUNTS = [
    Count(0, of=10, images=5, steps=40, image_steps=60, seconds=2.0),
    Count(1, of=10, images=2, steps=20, image_steps=20, seconds=2.0),
]


def show_two(told, *, last=False):
    told.show.tell(told.summary(COUNTS), last)


def pair(monkeypatch, **how):
    """The first of two processes, as far as what it shows goes."""
    monkeypatch.setattr(Ranks, "gather", lambda self, value: [value] * self.size)
    monkeypatch.setattr(progress, "_board", lambda group: progress.dist.HashStore())
    return Progress(Ranks(0, 2), 10, **{"total": 24, "before": 4, "steps": 10, **how})


def test_plain_lines_where_there_is_no_terminal(stderr, clock, monkeypatch):
    """At once, then each half a minute, and at the end."""
    read, told = stderr(False), pair(monkeypatch)
    line = (
        "11 of 24 samples, 4 images/s, 30 steps/s, ETA 00:08; process 0: 5 of 10, 3 images/s, 20 steps/s, ETA 00:01; "
    )
    line += "process 1: 2 of 10, 1 images/s, 10 steps/s, ETA 00:08\n"
    show_two(told)
    assert read() == line
    clock.now += progress.PRINT_EVERY - 0.1
    show_two(told)
    assert read() == ""
    clock.now += 0.1
    show_two(told)
    assert read() == line
    show_two(told, last=True)
    assert read() == line


def test_a_plain_line_of_one_process(stderr):
    read, told = stderr(False), alone(show=True)
    told.show.tell(told.summary([Count(0, of=8)]), False)
    assert read() == "0 of 8 samples, 0 images/s, 0 steps/s, ETA ?\n"


def test_bars_on_a_terminal(stderr, monkeypatch):
    """One for all, with what was there before, and one of each process; as far as is drawn."""
    read, told = stderr(True), pair(monkeypatch)
    assert [bar.desc for bar in told.show.bars] == ["samples", "process 0", "process 1"]
    show_two(told)
    assert [(bar.n, bar.total) for bar in told.show.bars] == [(12, 24), (6, 10), (2, 10)]
    show_two(told, last=True)
    text = read()
    assert "12/24" in text
    assert "6/10" in text
    assert "4 images/s, 30 steps/s, ETA 00:08" in text
    assert all(bar.disable for bar in told.show.bars)  # closed


def test_one_bar_for_one_process(stderr):
    read, told = stderr(True), alone(show=True)
    with told:
        told.stepped(10, 3)
        told.done()
    assert [bar.desc for bar in told.show.bars] == ["samples"]
    text = read()
    assert "3/8" in text
    assert text.endswith("\n")


def test_nothing_is_shown_unless_asked_for(stderr):
    for terminal in (True, False):
        read = stderr(terminal)
        with alone():
            time.sleep(0.02)
        assert read() == ""


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_json_lines(tmp_path, clock):
    """At once, then each ten seconds, and at the end."""
    path = tmp_path / "log"
    log = alone(json_log=path).log
    for wait, want in ((0, 1), (progress.LOG_EVERY - 0.1, 1), (0.1, 2), (1, 2)):
        clock.now += wait
        log.tell({"n": clock.now}, False)
        assert len(lines(path)) == want
    log.tell({"n": -1}, True)
    assert lines(path) == [{"n": 1000.0}, {"n": 1010.0}, {"n": -1}]
    assert path.read_text().endswith("}\n")


@pytest.mark.parametrize("before", ["", '{"n": 1}\n', '{"n": 1}\n{"n":', "x", "\n", '{"n": 1}'])
def test_json_lines_are_added_to_a_file(tmp_path, before):
    """On lines of their own, also after one that a kill has torn."""
    path = tmp_path / "log"
    path.write_text(before)
    with alone(json_log=path):
        pass
    between = "\n" if before and not before.endswith("\n") else ""
    assert path.read_text().startswith(before + between)
    added = path.read_text()[len(before + between) :]
    assert added.endswith("\n")
    assert all(json.loads(line)["of"] == 8 for line in added.splitlines())
    assert added


def test_json_lines_of_a_run(tmp_path, monkeypatch):
    """As the counts are; the last one when all is done."""
    monkeypatch.setattr(progress, "LOG_EVERY", 0)
    path = tmp_path / "log"
    with alone(part=5, total=8, before=3, json_log=path) as told:
        told.stepped(10, 5)
        told.stored(5)
        until(lambda: path.exists() and lines(path)[-1]["images"] == 8)
        assert lines(path)[-1]["ranks"][0]["state"] == "running"
        told.done()
    last = lines(path)[-1]
    assert (last["images"], last["of"], last["drawn"], last["eta_s"]) == (8, 8, 8, 0)
    assert last["ranks"][0]["state"] == "done"
    assert last["images_per_s"] > 0


def until(true):
    """Wait for what a thread is to do; it takes no time but on a busy machine."""
    for _ in range(2000):
        if true():
            return
        time.sleep(0.005)
    raise AssertionError("it has not happened in ten seconds")


def test_a_pipe_is_told_as_it_is(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    read = []
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        with alone(json_log=tmp_path / "pipe"):
            pass
        read = os.read(reader, 1 << 16).decode().splitlines()
    finally:
        os.close(reader)
    assert json.loads(read[-1])["of"] == 8


class Full:
    """A disk that is full: /dev/full, as Linux has it."""

    path = "/dev/full"


@pytest.mark.skipif(not os.path.exists(Full.path), reason="there is no /dev/full")
def test_a_log_that_cannot_be_written_ends_the_job(monkeypatch):
    """By the next step, and not the thread alone; the error names the file."""
    told = alone(json_log=Full.path)

    def work():
        with told:
            until(lambda: told.stepped(1, 1))

    with pytest.raises(OSError, match="No space left on device") as caught:
        work()
    assert caught.value.filename == Full.path
    assert not told._thread.is_alive()


@pytest.mark.skipif(not os.path.exists(Full.path), reason="there is no /dev/full")
def test_a_log_that_cannot_be_written_at_the_end(monkeypatch):
    """A job without a step left is not done, either; but what failed before is told instead."""
    monkeypatch.setattr(progress, "BEAT", 10)
    with pytest.raises(OSError, match="No space left on device"), alone(json_log=Full.path):
        pass
    with pytest.raises(KeyError, match="first"), alone(json_log=Full.path):
        raise KeyError("first")


def test_a_failure_is_in_the_last_line(tmp_path):
    for error, state in (
        (ValueError("two\n lines"), "two lines"),
        (KeyboardInterrupt(), "stopped"),
        (KeyError(1), None),
    ):
        path = tmp_path / "log"
        with pytest.raises(type(error)), alone(json_log=path):
            raise error
        assert lines(path)[-1]["ranks"][0]["state"] == (state or "KeyError: 1")


def test_what_fails_elsewhere_is_raised_in_a_step():
    with alone() as told:
        told.stepped(1, 1)
        told.fail(OSError("of the writer"))
        for call in (told.check, lambda: told.stepped(1, 1)):
            with pytest.raises(OSError, match="of the writer"):
                call()
        assert told.count.steps == 1
        told.failure = None


def test_a_signal_that_python_has_ignored_is_raised_in_a_step():
    """Before another error."""
    stopped = []
    told = alone(stopped=stopped)
    told.check()
    stopped.append(KeyboardInterrupt("asked"))
    told.fail(OSError("of the writer"))
    with pytest.raises(KeyboardInterrupt, match="asked"):
        told.stepped(1, 1)


def test_the_thread_ends_with_the_job():
    before = threading.active_count()
    with alone():
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


def test_a_process_that_is_silent_is_lost(monkeypatch):
    """After so many looks at the same sign of life; each new one makes them begin anew."""
    monkeypatch.setattr(progress, "SILENT", 3)
    told = pair(monkeypatch, show=False)

    def post(beat):
        told._post()
        told.board.set("1", json.dumps({"rank": 1, "of": 10, "beat": beat}))

    for beat in 4 * [1] + 4 * [2]:
        post(beat)
        told._listen(told._counts())
        told.look()  # finds nothing
    for _ in range(progress.SILENT):
        post(2)
        told._listen(told._counts())
    with pytest.raises(AgreedError, match=r"^process 1 has not been heard of for \d+ seconds$"):
        told.look()


def test_a_silent_process_ends_the_job(monkeypatch):
    """By the next step."""
    monkeypatch.setattr(progress, "SILENT", 2)
    told = pair(monkeypatch, show=False)
    told.board.set("1", json.dumps({"rank": 1, "of": 10, "beat": 1}))
    with pytest.raises(AgreedError, match="process 1 has not been heard of"), told:
        until(lambda: told.stepped(1, 1))


def test_a_board_that_does_not_answer(monkeypatch):
    """Its process, the first, is lost: which is an error that all have agreed upon."""
    told = alone()

    def refuse(*_):
        raise RuntimeError("Connection reset by peer")

    monkeypatch.setattr(told, "board", type("Gone", (), {"set": refuse, "check": refuse, "get": refuse})())
    assert error_line(told.look) == "process 0 was lost"
    with pytest.raises(LostError):
        told.look()
    assert issubclass(LostError, AgreedError)


def test_the_first_process_stays_until_the_others_have_read_why(monkeypatch):
    """The board is gone with it: two beats, after what failed is on it. Alone it ends at once."""
    slept = []
    told = pair(monkeypatch, show=False)
    told.board.set("1", json.dumps({"rank": 1, "of": 10}))
    read = lambda seconds: slept.append((seconds, told.board.check(["failed"])))
    monkeypatch.setattr(progress.time, "sleep", read)
    with pytest.raises(KeyError), told:
        raise KeyError("why")
    assert slept == [(2 * progress.BEAT, True)]
    with pytest.raises(KeyError), alone():
        raise KeyError("why")
    with alone():
        pass
    assert len(slept) == 1


def failing(rank, error, log):
    """One fails; the others step until they hear of it. Prints what each ends with."""
    progress.BEAT = 0.05
    with ranks("cpu") as group:
        told = Progress(group, 1000, total=3000, before=0, steps=10, show=False, json_log=log)
        try:
            with told:
                if group.rank == rank:
                    raise error
                until(lambda: told.stepped(1, 1))
        except BaseException as caught:
            print(type(caught).__name__, caught, sep=": ")
            group.gather(None)  # nobody goes before all have heard
        else:
            print("nothing")


@pytest.mark.slow
@pytest.mark.parametrize(("size", "rank"), [(2, 0), (2, 1), (3, 2)])
@pytest.mark.parametrize(
    ("error", "own", "state"),
    [
        (OSError(28, "No space\n left"), "OSError: [Errno 28] No space\n left", "[Errno 28] No space left"),
        (RuntimeError("odd"), "RuntimeError: odd", "RuntimeError: odd"),
        (KeyboardInterrupt(), "KeyboardInterrupt: ", "stopped"),
    ],
    ids=["disk", "odd", "stopped"],
)
def test_a_failure_reaches_all_processes(tmp_path, size, rank, error, own, state):
    """Each of the others raises it as one agreed upon, naming the process; the log's last line has it."""
    log = tmp_path / "log"
    ends, told = run_ranks(tmp_path, size, failing, rank, error, log)
    assert ends == [0] * size, told
    assert [text.rstrip("\n") for text in told] == [
        own.rstrip("\n") if i == rank else f"AgreedError: process {rank}: {state}" for i in range(size)
    ]
    assert lines(log)[-1]["ranks"][rank]["state"] == state


def counting(log):
    """Each does its part; the first one waits for the others."""
    progress.BEAT, progress.LOG_EVERY = 0.01, 0
    with ranks("cpu") as group:
        with Progress(group, 2 + group.rank, total=14, before=5, steps=4, show=False, json_log=log) as told:
            for _ in range(4):
                told.stepped(1, 2 + group.rank)
            told.stored(2 + group.rank)
            told.done()
            group.gather(None)
        print("done")


@pytest.mark.slow
def test_the_last_line_is_of_all_processes(tmp_path):
    log = tmp_path / "log"
    ends, told = run_ranks(tmp_path, 3, counting, log)
    assert (ends, told) == ([0] * 3, ["done\n"] * 3)
    *before, last = lines(log)
    assert (last["images"], last["of"], last["drawn"], last["eta_s"]) == (14, 14, 14, 0)
    assert [(rank["rank"], rank["images"], rank["of"], rank["state"]) for rank in last["ranks"]] == [
        (i, 2 + i, 2 + i, "done") for i in range(3)
    ]
    drawn = [line["drawn"] for line in before]
    assert drawn == sorted(drawn)
    assert math.isclose(last["images_per_s"], sum(rank["images_per_s"] for rank in last["ranks"]))
