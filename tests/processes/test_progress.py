"""Progress of a job: rates and remaining times, bars, lines and logs; failures reach all processes."""

import json
import math
import os
import subprocess
import sys
import threading
import time
from datetime import datetime, timedelta

import pytest

from fastddpm.processes import displays, distributed, progress
from fastddpm.processes.displays import JsonLog, check_log
from fastddpm.processes.distributed import AgreedError, Ranks, ranks
from fastddpm.processes.progress import Count, JobProgress, LostError
from tests.support.check import error_line
from tests.support.processes import run_ranks


@pytest.fixture(autouse=True)
def often(monkeypatch):
    monkeypatch.setattr(progress, "BEAT", 0.005)


def alone(part=8, *, total=8, before=0, steps=10, **how):
    return JobProgress(Ranks(), part, **{"total": total, "before": before, "steps": steps, "show": False, **how})


class Clock:
    """A time.monotonic that the test moves."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_summary(clock):
    """Of three processes: one has finished, one is in the middle, one has drawn more than it has stored."""
    job = alone(total=100, before=40, steps=10)
    clock.now += 7.1234567
    counts = [
        Count(0, of=10, images=10, steps=50, image_steps=100, seconds=5.0, state="done"),
        Count(1, of=20, images=4, steps=30, image_steps=60, seconds=6.0),
        Count(2, of=30, images=0, steps=40, image_steps=250, seconds=2.0),
    ]
    summary = job.summary(counts)
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


def test_summary_at_the_start():
    """The remaining time is unknown while one process has not started; it is 0 for a process without a part."""
    waiting, started, idle = Count(0, of=4), Count(1, of=4, steps=5, image_steps=20, seconds=1.0), Count(2, of=0)
    summary = alone().summary([waiting, started, idle])
    assert summary["eta_s"] is None
    assert [rank["eta_s"] for rank in summary["ranks"]] == [None, 1.0, 0.0]
    assert [rank["images_per_s"] for rank in summary["ranks"]] == [0.0, 2.0, 0.0]
    assert [rank["drawn"] for rank in summary["ranks"]] == [0, 2, 0]
    assert alone().summary([started, idle])["eta_s"] == 1.0


def test_repeated_steps_do_not_count_as_further_samples():
    summary = alone().summary([Count(0, of=4, images=4, steps=9, image_steps=70, seconds=2.0)])
    assert (summary["drawn"], summary["eta_s"]) == (4, 0.0)


def test_steps_and_samples_are_counted(clock):
    job = alone(part=6, total=9, before=3)
    clock.now += 2
    job.stepped(3, 4)
    clock.now += 1
    job.stepped(2, 1)
    clock.now += 5  # seconds without a step
    job.stored(4)
    job.stored(1)
    assert job.count == Count(0, 6, images=5, steps=5, image_steps=14, seconds=3.0, beat=1)
    job.done()
    (posted,) = job._counts()
    assert posted == job.count == Count(0, 6, images=5, steps=5, image_steps=14, seconds=3.0, state="done", beat=2)


@pytest.fixture
def stderr(monkeypatch, capsys):
    """A function that makes stderr a terminal or not, and returns a reader of what is printed."""

    def printed(terminal):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
        return lambda: capsys.readouterr().err

    return printed


COUNTS = [
    Count(0, of=10, images=5, steps=40, image_steps=60, seconds=2.0),
    Count(1, of=10, images=2, steps=20, image_steps=20, seconds=2.0),
]


def show_two(job, *, last=False):
    job.display.update(job.summary(COUNTS), last)


def pair(monkeypatch, **how):
    """The JobProgress of the first of two processes, without a second one."""
    monkeypatch.setattr(Ranks, "gather", lambda self, value: [value] * self.size)
    monkeypatch.setattr(progress, "_board", lambda group: progress.dist.HashStore())
    return JobProgress(Ranks(0, 2), 10, **{"total": 24, "before": 4, "steps": 10, **how})


def test_plain_lines_without_a_terminal(stderr, clock, monkeypatch):
    """At once, then every half a minute, and at the end."""
    read, job = stderr(False), pair(monkeypatch)
    line = (
        "11 of 24 samples, 4 images/s, 30 steps/s, ETA 00:08; process 0: 5 of 10, 3 images/s, 20 steps/s, ETA 00:01; "
    )
    line += "process 1: 2 of 10, 1 images/s, 10 steps/s, ETA 00:08\n"
    show_two(job)
    assert read() == line
    clock.now += displays.PRINT_EVERY - 0.1
    show_two(job)
    assert read() == ""
    clock.now += 0.1
    show_two(job)
    assert read() == line
    show_two(job, last=True)
    assert read() == line


def test_plain_line_of_one_process(stderr):
    read, job = stderr(False), alone(show=True)
    job.display.update(job.summary([Count(0, of=8)]), False)
    assert read() == "0 of 8 samples, 0 images/s, 0 steps/s, ETA ?\n"


def test_bars_on_a_terminal(stderr, monkeypatch):
    """One for the job, with the samples that existed before, and one per process."""
    read, job = stderr(True), pair(monkeypatch)
    assert [bar.desc for bar in job.display.bars] == ["samples", "process 0", "process 1"]
    show_two(job)
    assert [(bar.n, bar.total) for bar in job.display.bars] == [(12, 24), (6, 10), (2, 10)]
    show_two(job, last=True)
    text = read()
    assert "12/24" in text
    assert "6/10" in text
    assert "4 images/s, 30 steps/s, ETA 00:08" in text
    assert all(bar.disable for bar in job.display.bars)  # closed


def test_one_bar_for_one_process(stderr):
    read, job = stderr(True), alone(show=True)
    with job:
        job.stepped(10, 3)
        job.done()
    assert [bar.desc for bar in job.display.bars] == ["samples"]
    text = read()
    assert "3/8" in text
    assert text.endswith("\n")


class Unwritable:
    """A stderr whose disk is full, whose reader has gone, or that is closed."""

    encoding = "utf-8"

    def __init__(self, error, terminal):
        self.error, self.isatty = error, lambda: terminal

    def write(self, text):
        raise self.error

    flush = lambda self: self.write("")


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("error", [OSError(28, "full"), BrokenPipeError(32, "closed"), ValueError("closed file")])
def test_job_goes_on_without_stderr(monkeypatch, error, terminal, tmp_path):
    """Also from a stderr that fails later; the log goes on."""
    monkeypatch.setattr(sys, "stderr", Unwritable(error, terminal))
    with alone(show=True, json_log=tmp_path / "log") as job:
        for _ in range(10):
            time.sleep(0.005)
            job.stepped(1, 8)
        job.stored(8)
        job.done()
    assert lines(tmp_path / "log")[-1]["images"] == 8
    monkeypatch.setattr(sys, "stderr", None)  # as Python starts if it is closed
    with alone(show=True) as job:
        job.done()


def test_nothing_is_shown_without_show(stderr):
    for terminal in (True, False):
        read = stderr(terminal)
        with alone():
            time.sleep(0.02)
        assert read() == ""


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_json_lines(tmp_path, clock):
    """At once, then every ten seconds, and at the end."""
    path = tmp_path / "log"
    log = JsonLog(path)
    for wait, want in ((0, 1), (displays.LOG_EVERY - 0.1, 1), (0.1, 2), (1, 2)):
        clock.now += wait
        log.update({"n": clock.now}, False)
        assert len(lines(path)) == want
    log.update({"n": -1}, True)
    assert lines(path) == [{"n": 1000.0}, {"n": 1010.0}, {"n": -1}]
    assert path.read_text().endswith("}\n")


def line(**changed):
    """A line of a log."""
    return json.dumps({**alone().summary([Count(0, of=8)]), **changed}) + "\n"


@pytest.mark.parametrize("torn", ["", "{", '{"ti', '{"time": "2026-', line()[:-1], line()[:-20]])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_json_lines_are_appended(tmp_path, count, torn):
    """Instead of the incomplete line that a killed process left."""
    path = tmp_path / "log"
    before = "".join(line(images=i) for i in range(count))
    path.write_text(before + torn)
    check_log(path)
    assert path.read_text() == before + torn
    with alone(json_log=path):
        pass
    assert path.read_text().startswith(before)
    assert all(json.loads(added)["of"] == 8 for added in path.read_text().splitlines())
    assert len(lines(path)) > count


OTHERS = {
    "a manifest": json.dumps({"format": "npz", "samples": "0-3"}, indent=1),
    "a config": '{"_class_name": "UNet2DModel"}',
    "another log": line() + '{"step": 1, "loss": 0.5}\n' + line(),
    "a torn line within": line() + line()[:40] + "\n" + line(),
    "the torn line of another log": line() + '{"step": 1, "lo',
    "one line of another file": '{"time": "2020-01-01", "measurements": [1, 2, 3]}',
    "text": "x",
    "an empty line": "\n",
    "a number": "1\n",
    "nested": "[" * 100_000 + "\n",
    "bytes": "\0\udcff\n",
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_files_are_not_appended_to(tmp_path, what):
    path = tmp_path / "log"
    content = OTHERS[what].encode(errors="surrogateescape")
    path.write_bytes(content)
    want = f"{path} is not a log of a job's progress: its line "
    assert error_line(check_log, path).startswith(want)
    assert error_line(check_log, path).endswith("; name a new file for the log")
    with pytest.raises(ValueError, match="is not a log"), alone(json_log=path):
        pass
    assert path.read_bytes() == content


def test_long_line_is_not_read(tmp_path, monkeypatch):
    """A large file of something else may have no line ends."""
    monkeypatch.setattr(displays, "LONGEST_LINE", 2000)
    (tmp_path / "log").write_text(line() + "x" * 3000)
    assert "its line b'xxx" in error_line(check_log, tmp_path / "log")


def test_places_that_no_log_can_be_written_to(tmp_path):
    assert "it is a folder" in error_line(check_log, tmp_path)
    assert "cannot be the name of a file" in error_line(check_log, "a\0b")
    os.mkfifo(tmp_path / "pipe")
    check_log(tmp_path / "pipe")  # which is not read
    check_log(tmp_path / "new" / "log")
    assert not (tmp_path / "new" / "log").exists()


def test_json_lines_of_a_run(tmp_path, monkeypatch):
    """They follow the counts; the last one shows the finished job."""
    monkeypatch.setattr(displays, "LOG_EVERY", 0)
    path = tmp_path / "log"
    with alone(part=5, total=8, before=3, json_log=path) as job:
        job.stepped(10, 5)
        job.stored(5)
        until(lambda: path.exists() and any(line["images"] == 8 for line in lines(path)))
        assert lines(path)[-1]["ranks"][0]["state"] == "running"
        job.done()
    last = lines(path)[-1]
    assert (last["images"], last["of"], last["drawn"], last["eta_s"]) == (8, 8, 8, 0)
    assert last["ranks"][0]["state"] == "done"
    assert last["images_per_s"] > 0


def until(condition):
    """Wait for another thread to make a condition true."""
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError("the condition has not become true in ten seconds")


def test_json_lines_go_to_a_pipe(tmp_path):
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


def test_a_pipe_stays_open_for_its_reader(tmp_path, clock):
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE) as reader:
        log = JsonLog(tmp_path / "pipe")
        while True:  # until it has opened the pipe
            try:
                log.update({"n": 0}, last=False)
                break
            except ValueError:
                time.sleep(0.01)
        for n in (1, 2):
            clock.now += displays.LOG_EVERY
            log.update({"n": n}, last=n == 2)
        assert reader.stdout.read().splitlines() == [b'{"n": 0}', b'{"n": 1}', b'{"n": 2}']


def test_a_pipe_that_nobody_reads_ends_the_job(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"^nobody reads the pipe .*/pipe; start its reader first"):
        JsonLog(tmp_path / "pipe").update({}, last=True)


class Full:
    """A full disk: /dev/full of Linux."""

    path = "/dev/full"


@pytest.mark.skipif(not os.path.exists(Full.path), reason="there is no /dev/full")
def test_unwritable_log_ends_the_job(monkeypatch):
    """At the next step, in the thread that draws; the error names the file."""
    job = alone(json_log=Full.path)

    def work():
        with job:
            until(lambda: job.stepped(1, 1))

    with pytest.raises(OSError, match="No space left on device") as caught:
        work()
    assert caught.value.filename == Full.path
    assert not job._thread.is_alive()


@pytest.mark.skipif(not os.path.exists(Full.path), reason="there is no /dev/full")
def test_log_that_becomes_unwritable_fails_the_job_at_its_end(monkeypatch):
    """Also without a further step; but an earlier error takes precedence."""
    monkeypatch.setattr(progress, "BEAT", 10)
    with pytest.raises(OSError, match="No space left on device"), alone(json_log=Full.path):
        pass
    with pytest.raises(KeyError, match="first"), alone(json_log=Full.path):
        raise KeyError("first")


def test_last_line_of_the_log_holds_the_failure(tmp_path):
    for error, state in (
        (ValueError("two\n lines"), "two lines"),
        (KeyboardInterrupt(), "stopped"),
        (KeyError(1), None),
    ):
        path = tmp_path / "log"
        with pytest.raises(type(error)), alone(json_log=path):
            raise error
        assert lines(path)[-1]["ranks"][0]["state"] == (state or "KeyError: 1")


def test_failure_elsewhere_is_raised_at_the_next_step():
    with alone() as job:
        job.stepped(1, 1)
        job.fail(OSError("of the writer"))
        job.fail(OSError("of a later shard"))
        for call in (job.check, lambda: job.stepped(1, 1)):
            with pytest.raises(OSError, match="of the writer"):
                call()
        assert job.count.steps == 1
        job.failure = None


def test_signal_that_python_ignored_is_raised_at_the_next_step():
    """It takes precedence over another error."""
    stopped = []
    job = alone(stopped=stopped)
    job.check()
    stopped.append(KeyboardInterrupt("asked"))
    job.fail(OSError("of the writer"))
    with pytest.raises(KeyboardInterrupt, match="asked"):
        job.stepped(1, 1)


def test_thread_ends_with_the_job():
    before = threading.active_count()
    with alone():
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


def boards(folder):
    """Each rank prints the addresses at which this process listens, with and without a board."""
    with ranks("cpu") as group:
        before = listening()
        job = JobProgress(group, 1, total=2, before=0, steps=1, show=False)
        print(json.dumps(sorted(listening() - before)))
        group.gather(None)
        job.look()
        group.gather(None)


def listening():
    """The local addresses, in hexadecimal, of this process's sockets that listen; 0100007F is 127.0.0.1."""
    own = {
        os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{fd}")
    }
    found = set()
    for table in ("tcp", "tcp6"):
        with open(f"/proc/net/{table}") as file:
            for row in list(file)[1:]:
                _, address, _, state, *rest = row.split()
                if state == "0A" and f"socket:[{rest[5]}]" in own:
                    found.add(address)
    return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("several_machines", [False, True])
def test_board_listens_to_this_machine_alone(tmp_path, several_machines):
    """If that is all there is."""
    ends, outputs = run_ranks(tmp_path, 2, boards_of_several if several_machines else boards, tmp_path)
    assert ends == [0, 0], outputs
    first, other = map(json.loads, outputs)
    assert other == []
    (address,) = first
    assert address.startswith("0100007F:") != several_machines


def boards_of_several(folder):
    distributed._LOOPBACK = ()
    boards(folder)


def test_silent_process_is_lost(monkeypatch):
    """After SILENT looks at the same sign of life; a new one restarts the count."""
    monkeypatch.setattr(progress, "SILENT", 3)
    job = pair(monkeypatch, show=False)

    def post(beat):
        job._post()
        job.board.set("1", json.dumps({"rank": 1, "of": 10, "beat": beat}))

    for beat in 4 * [1] + 4 * [2]:
        post(beat)
        job._find_silent(job._counts())
        job.look()  # raises nothing
    for _ in range(progress.SILENT):
        post(2)
        job._find_silent(job._counts())
    with pytest.raises(AgreedError, match=r"^process 1 has given no sign of life for \d+ seconds$"):
        job.look()


def test_silent_process_ends_the_job(monkeypatch):
    """At the next step."""
    monkeypatch.setattr(progress, "SILENT", 2)
    job = pair(monkeypatch, show=False)
    job.board.set("1", json.dumps({"rank": 1, "of": 10, "beat": 1}))
    with pytest.raises(AgreedError, match="process 1 has given no sign of life"), job:
        until(lambda: job.stepped(1, 1))


def test_board_that_does_not_answer(monkeypatch):
    """The first process, which holds the board, is lost. All processes see that, so it counts as agreed."""
    job = alone()

    def refuse(*_):
        raise RuntimeError("Connection reset by peer")

    monkeypatch.setattr(job, "board", type("Gone", (), {"set": refuse, "check": refuse, "get": refuse})())
    assert error_line(job.look) == "process 0 was lost"
    with pytest.raises(LostError):
        job.look()
    assert issubclass(LostError, AgreedError)


def test_first_process_waits_until_the_others_have_read_the_error(monkeypatch):
    """For two beats after the error is on the board, which ends with the process. With one process it ends at once."""
    slept = []
    job = pair(monkeypatch, show=False)
    job.board.set("1", json.dumps({"rank": 1, "of": 10}))
    read = lambda seconds: slept.append((seconds, job.board.check(["failed"])))
    monkeypatch.setattr(progress.time, "sleep", read)
    with pytest.raises(KeyError), job:
        raise KeyError("why")
    assert slept == [(2 * progress.BEAT, True)]
    with pytest.raises(KeyError), alone():
        raise KeyError("why")
    with alone():
        pass
    assert len(slept) == 1


def failing(rank, error, log):
    """One rank fails; the others step until they learn of it. Each prints what it ends with."""
    progress.BEAT = 0.05
    with ranks("cpu") as group:
        job = JobProgress(group, 1000, total=3000, before=0, steps=10, show=False, json_log=log)
        try:
            with job:
                if group.rank == rank:
                    raise error
                until(lambda: job.stepped(1, 1))
        except BaseException as caught:
            print(type(caught).__name__, caught, sep=": ")
            group.gather(None)  # no rank exits before all have learned of it
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
def test_failure_reaches_all_processes(tmp_path, size, rank, error, own, state):
    """The others raise an AgreedError that names the process; the last line of the log holds it."""
    log = tmp_path / "log"
    ends, outputs = run_ranks(tmp_path, size, failing, rank, error, log)
    assert ends == [0] * size, outputs
    assert [text.rstrip("\n") for text in outputs] == [
        own.rstrip("\n") if i == rank else f"AgreedError: process {rank}: {state}" for i in range(size)
    ]
    assert lines(log)[-1]["ranks"][rank]["state"] == state


def counting(log):
    """Each rank does its part; the first one waits for the others."""
    progress.BEAT = 0.01
    displays.LOG_EVERY = 0
    with ranks("cpu") as group:
        with JobProgress(group, 2 + group.rank, total=14, before=5, steps=4, show=False, json_log=log) as job:
            for _ in range(4):
                job.stepped(1, 2 + group.rank)
            job.stored(2 + group.rank)
            job.done()
            group.gather(None)
        print("done")


@pytest.mark.slow
def test_last_line_covers_all_processes(tmp_path):
    log = tmp_path / "log"
    ends, outputs = run_ranks(tmp_path, 3, counting, log)
    assert (ends, outputs) == ([0] * 3, ["done\n"] * 3)
    *before, last = lines(log)
    assert (last["images"], last["of"], last["drawn"], last["eta_s"]) == (14, 14, 14, 0)
    assert [(rank["rank"], rank["images"], rank["of"], rank["state"]) for rank in last["ranks"]] == [
        (i, 2 + i, 2 + i, "done") for i in range(3)
    ]
    drawn = [line["drawn"] for line in before]
    assert drawn == sorted(drawn)
    assert math.isclose(last["images_per_s"], sum(rank["images_per_s"] for rank in last["ranks"]))
