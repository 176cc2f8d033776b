"""Disturbed jobs: kills at any moment, signals, full disks, two jobs on one folder, lost processes."""

import errno
import functools
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from fastddpm.cli.main import main
from fastddpm.processes import progress, signals
from fastddpm.processes.distributed import ranks
from fastddpm.processes.progress import JobProgress
from fastddpm.sampling import job
from fastddpm.sampling.sampler import Sampler
from fastddpm.storage.files import TEMPORARY, locked
from fastddpm.storage.shards import ShardFolder
from tests.support.jobs import command, contents, drawn, finished, note_drawn, options, save_tiny
from tests.support.processes import run_ranks, start

FLAGS = "--num-samples 9 --shard-size 2 --batch-size 2 --format npz --quiet"  # shards of 2, 2, 2, 2 and 1


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    """The contents of the finished folder of FLAGS."""
    out = tmp_path_factory.mktemp("undisturbed")
    assert main(options(tiny, out, FLAGS)) == 0
    return contents(out)


def error(output):
    """The message of a command that failed with one line."""
    assert re.fullmatch(r"fastddpm: error: .+\n", output), output
    return output.removeprefix("fastddpm: error: ").strip()


def alone(tmp_path, arguments, *hooks):
    """Run the command in a new process. Returns: its exit status and all its output."""
    file = tmp_path / "output"
    file.unlink(missing_ok=True)
    process = start(file, command, arguments, *hooks)
    process.join(120)
    process.kill()
    process.join()
    return process.exitcode, file.read_text()


def only_whole_files(out):
    """Whether a folder holds no temporary files."""
    return not [name for name in contents(out) if TEMPORARY in name]


def before_storing(shard, act, rank="0"):
    """Call act before the process of this rank stores its shard of this number, counted from 0."""
    if os.environ.get("RANK", "0") != rank:
        return
    left, write = [shard], ShardFolder.write

    def counted(self, k, samples):
        left[0] -= 1
        if left[0] == -1:
            act()
        write(self, k, samples)

    ShardFolder.write = counted  # type: ignore[method-assign]


def before_drawing(shard, act, rank="0"):
    """Like `before_storing`, but before the shard is drawn."""
    if os.environ.get("RANK", "0") != rank:
        return
    left, sample = [shard], Sampler.sample

    def counted(self, *args, **settings):
        left[0] -= 1
        if left[0] == -1:
            act()
        return sample(self, *args, **settings)

    Sampler.sample = counted  # type: ignore[method-assign]


def send(number):
    os.kill(os.getpid(), number)


# A disk that is full


def full(call, place):
    """From now on this system call reports a full disk for files whose path contains `place`."""

    def no_space(handle, *args):
        if place in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(handle, *args)

    original = getattr(os, call)
    setattr(os, call, no_space)


def limited(size):
    """Limit the size of files: a larger write fails with EFBIG, because Python ignores the signal."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("act", "why"),
    [
        (functools.partial(full, "fsync", "/out/"), "No space left on device"),
        (functools.partial(limited, 200), "File too large"),
    ],
    ids=["fsync", "write"],
)
def test_full_disk_is_a_one_line_error_and_finished_shards_stay(tiny, undisturbed, tmp_path, act, why):
    """The error names the file. Once there is space, the same command draws only what is missing."""
    out = tmp_path / "out"
    status, output = alone(tmp_path, options(tiny, out, FLAGS), functools.partial(before_storing, 2, act))
    assert status == 2
    assert why in error(output)
    assert f"{out}/00002.npz" in output
    assert only_whole_files(out)
    assert finished(out) == {0, 1, 2, 3}
    status, output = alone(tmp_path, options(tiny, out, FLAGS), functools.partial(note_drawn, tmp_path))
    assert (status, output) == (0, "")
    assert drawn(tmp_path) == [[4, 5, 6, 7, 8]]
    assert contents(out) == undisturbed


@pytest.mark.slow
def test_disk_full_from_the_start(tiny, tmp_path):
    out = tmp_path / "out"
    status, output = alone(tmp_path, options(tiny, out, FLAGS), functools.partial(full, "fsync", "/out/"))
    assert status == 2
    assert "No space left on device" in error(output)
    assert f"{out}/manifest.json" in output
    assert list(contents(out)) == [".shards"]


@pytest.mark.slow
@pytest.mark.parametrize("failing", ["0", "1"])
def test_full_disk_of_one_process_ends_all(tiny, undisturbed, tmp_path, failing):
    """Each prints one line: the error of the process whose disk is full."""
    out = tmp_path / "out"
    hook = functools.partial(before_storing, 1, functools.partial(full, "fsync", "/out/"), failing)
    statuses, outputs = run_ranks(tmp_path, 2, command, options(tiny, out, f"{FLAGS} --num-samples 200"), hook)
    assert statuses == [2, 2]
    its, others = outputs[int(failing)], outputs[1 - int(failing)]
    assert re.fullmatch(rf"\[Errno 28\] No space left on device; free some space, .*: '{out}/\d+.npz'", error(its))
    assert error(others) == f"process {failing}: {error(its)}"
    assert only_whole_files(out)
    assert finished(out)


@pytest.mark.slow
def test_waiting_process_reports_why_another_failed(tiny, tmp_path):
    """Not only that it was lost."""
    out = tmp_path / "out"
    hooks = [
        functools.partial(before_storing, 1, functools.partial(full, "fsync", "/out/"), "1"),
        functools.partial(before_drawing, 1, functools.partial(stay, 1), "1"),
    ]
    statuses, outputs = run_ranks(tmp_path, 2, command, options(tiny, out, FLAGS), *hooks)
    assert statuses == [2, 2]
    assert error(outputs[0]) == f"process 1: {error(outputs[1])}"
    assert finished(out) == {0, 1, 2, 3, 4, 5, 8}


@pytest.mark.slow
def test_log_that_cannot_be_written_ends_all(tiny, tmp_path):
    """Process 0 writes the log; process 1 reports that error."""
    flags = f"{FLAGS} --num-samples 500 --json-log {tmp_path}/log"
    hook = functools.partial(before_storing, 1, functools.partial(be_a_folder, tmp_path / "log"))
    statuses, outputs = run_ranks(
        tmp_path, 2, command, options(tiny, tmp_path / "out", flags), hook, log_always, slowly
    )
    assert statuses == [2, 2], outputs
    assert error(outputs[0]) == f"[Errno 21] Is a directory: '{tmp_path}/log'"
    assert error(outputs[1]) == f"process 0: {error(outputs[0])}"


def be_a_folder(path):
    path.unlink(missing_ok=True)
    path.mkdir()


def log_always():
    from fastddpm.processes import displays

    displays.LOG_EVERY = 0.0


def slowly(seconds=0.01):
    """Make drawing a shard take longer."""
    sample = Sampler.sample

    def slow(self, *args, **settings):
        time.sleep(seconds)
        return sample(self, *args, **settings)

    Sampler.sample = slow  # type: ignore[method-assign]


# A folder that is read-only, or that another job writes


def read_only(place):
    """Make the files in `place` read-only for this process, even if it runs as root."""

    def refuse(event, args):
        writes = (event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)) or event in ("os.mkdir", "os.remove")
        if (writes and str(args[0]).startswith(str(place))) or (event == "os.rename" and place in args[0]):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(args[0]))

    sys.addaudithook(refuse)


@pytest.mark.slow
def test_read_only_folder_is_a_one_line_error(tiny, tmp_path):
    """From the start, and from the third shard on."""
    out = tmp_path / "out"
    hook = functools.partial(read_only, f"{out}")
    status, output = alone(tmp_path, options(tiny, out, FLAGS), hook)
    assert (status, error(output)) == (2, f"cannot write {out}: Read-only file system; name another place")
    assert not out.exists()
    later = functools.partial(before_storing, 2, hook)
    status, output = alone(tmp_path, options(tiny, out, FLAGS), later)
    assert status == 2
    assert "Read-only file system" in error(output)
    assert finished(out) == {0, 1, 2, 3}
    before = contents(out)
    status, output = alone(tmp_path, options(tiny, out, FLAGS), hook)
    assert (status, error(output)) == (2, f"cannot write {out}: Read-only file system; name another place")
    assert contents(out) == before


def wait_for(path, seconds=60.0):
    until = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < until:
        time.sleep(0.01)
    assert path.exists()


@pytest.mark.slow
def test_second_job_on_a_folder_is_refused(tiny, undisturbed, tmp_path):
    """In one line, whether it is the same job or another; the first job is not disturbed."""
    out, go = tmp_path / "out", tmp_path / "go"
    first = start(
        tmp_path / "first",
        command,
        options(tiny, out, FLAGS),
        functools.partial(before_storing, 1, functools.partial(wait_for, go)),
    )
    wait_for(out / ".shards" / "00000")
    before = contents(out)
    for flags in (FLAGS, f"{FLAGS} --seed 1"):
        status, output = alone(tmp_path, options(tiny, out, flags))
        assert (status, error(output)) == (
            2,
            f"{out} is being written by another process; wait until it has ended, or name another folder",
        )
    statuses, both = run_ranks(tmp_path, 2, command, options(tiny, out, FLAGS))
    assert statuses == [2, 2]
    assert {error(output).partition(";")[0] for output in both} == {f"{out} is being written by another process"}
    assert contents(out) == before
    go.touch()
    first.join()
    assert (first.exitcode, (tmp_path / "first").read_text()) == (0, "")
    assert contents(out) == undisturbed


# Signals


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_ends_a_job_with_one_line(tiny, undisturbed, tmp_path, number, status):
    """Before any shard, between two, and before the last; the shards drawn by then are written."""
    out, arguments = tmp_path / "out", options(tiny, tmp_path / "out", FLAGS)
    done = 0
    for shards, reached in ((0, 0), (2, 4), (1, 6), (1, 8)):
        act = functools.partial(before_drawing, shards, functools.partial(send, number))
        hooks = [functools.partial(note_drawn, tmp_path), act]
        got, output = alone(tmp_path, arguments, *hooks)
        assert got == status
        assert output == f"\nfastddpm: stopped: {reached} of 9 samples are done; the same command resumes the job\n"
        assert drawn(tmp_path) == ([list(range(done, reached))] if reached > done else [])
        assert finished(out) == set(range(reached))
        assert only_whole_files(out)
        done = reached
    assert alone(tmp_path, arguments) == (0, "")
    assert contents(out) == undisturbed


def stay(seconds=60):
    time.sleep(seconds)


def send_twice(number, after):
    later = f"import os, time; time.sleep({after}); os.kill({os.getpid()}, {int(number)})"
    subprocess.Popen([sys.executable, "-S", "-c", later])
    send(number)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_ends_a_job_at_once(tiny, undisturbed, tmp_path, number):
    """While the first one waits for a hanging disk."""
    out = tmp_path / "out"
    hooks = [
        functools.partial(before_storing, 1, stay),
        functools.partial(before_drawing, 2, functools.partial(send_twice, number, signals.REPEAT_SECONDS + 0.3)),
    ]
    began = time.monotonic()
    assert alone(tmp_path, options(tiny, out, FLAGS), *hooks) == (-number, "")
    assert time.monotonic() - began < 30
    assert finished(out) == {0, 1}
    assert alone(tmp_path, options(tiny, out, FLAGS)) == (0, "")
    assert contents(out) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_repeated_at_once_counts_as_one(tiny, tmp_path, number, status):
    """As when a scheduler and torchrun both send it: the shards drawn by then are written, with one message."""
    out = tmp_path / "out"
    hooks = [
        functools.partial(before_storing, 1, functools.partial(stay, 1.5)),
        functools.partial(before_drawing, 2, functools.partial(send_twice, number, 0.3)),
    ]
    message = "\nfastddpm: stopped: 4 of 9 samples are done; the same command resumes the job\n"
    assert alone(tmp_path, options(tiny, out, FLAGS), *hooks) == (status, message)
    assert finished(out) == {0, 1, 2, 3}
    assert only_whole_files(out)


def when_done(act, rank="0"):
    """Call act soon after the process of this rank has nothing left to draw."""
    if os.environ.get("RANK", "0") != rank:
        return
    done = JobProgress.done

    def soon(self):
        done(self)
        threading.Timer(0.3, act).start()

    JobProgress.done = soon  # type: ignore[method-assign]


@pytest.mark.slow
def test_waiting_process_reacts_to_signals(tiny, tmp_path):
    out = tmp_path / "out"
    hooks = [
        functools.partial(when_done, functools.partial(send, signal.SIGTERM)),
        functools.partial(before_drawing, 1, functools.partial(stay, 3), "1"),
    ]
    statuses, outputs = run_ranks(tmp_path, 2, command, options(tiny, out, FLAGS), *hooks)
    assert statuses == [143, 2]
    message = r"\nfastddpm: stopped: [57] of 9 samples are done; the same command resumes the job\n"
    assert re.fullmatch(message, outputs[0])  # as of the last look at the other
    assert error(outputs[1]) == "process 0: stopped"
    assert finished(out) == {0, 1, 2, 3, 4, 5, 8}


def test_signal_handlers_of_the_program_are_kept(tiny, tmp_path):
    """And the handlers of before the job are restored."""
    sampler, heard = Sampler.from_pretrained(tiny, device="cpu"), []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        own, sample = signal.getsignal(signal.SIGTERM), sampler.sample
        sampler.sample = lambda *args, **settings: (send(signal.SIGTERM), sample(*args, **settings))[1]
        job.sample_to(tmp_path / "own", sampler, 4, shard_size=2, progress=False)
        assert heard == [signal.SIGTERM] * 2
        assert signal.getsignal(signal.SIGTERM) is own
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with pytest.raises(signals.Stopped, match="0 of 4 samples are done") as stopped:
            job.sample_to(tmp_path / "default", sampler, 4, shard_size=2, progress=False)
        assert stopped.value.number == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.slow
@pytest.mark.parametrize("signalled", ["0", "1"])
def test_signal_to_one_of_two_processes_ends_both(tiny, tmp_path, signalled):
    out = tmp_path / "out"
    hook = functools.partial(before_drawing, 2, functools.partial(send, signal.SIGTERM), signalled)
    statuses, outputs = run_ranks(tmp_path, 2, command, options(tiny, out, f"{FLAGS} --num-samples 400"), hook, slowly)
    its, other = int(signalled), 1 - int(signalled)
    assert (statuses[its], statuses[other]) == (143, 2)
    assert error(outputs[other]) == f"process {signalled}: stopped"
    if signalled == "0":
        assert re.fullmatch(r"\nfastddpm: stopped: \d+ of 400 samples are done; the same .*\n", outputs[0])
    else:
        assert outputs[1] == ""
    assert 8 <= len(finished(out)) < 400
    assert only_whole_files(out)


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["0", "1"])
@pytest.mark.parametrize("when", ["drawing", "waiting"])
def test_lost_process_ends_the_other(tiny, tmp_path, lost, when):
    """Without torchrun, which would notice: while both draw, and when the other has nothing left to draw."""
    out, shards = tmp_path / "out", 100 if when == "drawing" else 2
    hooks = [functools.partial(before_drawing, 1, functools.partial(send, signal.SIGKILL), lost)]
    hooks += [slowly] if when == "drawing" else [functools.partial(before_drawing, 1, functools.partial(stay, 1), lost)]
    flags = f"{FLAGS} --num-samples {4 * shards}"
    began = time.monotonic()
    statuses, outputs = run_ranks(tmp_path, 2, command, options(tiny, out, flags), *hooks)
    assert time.monotonic() - began < 60
    assert (statuses[int(lost)], outputs[int(lost)]) == (-signal.SIGKILL, "")
    assert statuses[1 - int(lost)] == 2
    last = outputs[1 - int(lost)].splitlines()[-1]  # torch prints more if process 0 is lost
    assert last == f"fastddpm: error: {'process 0' if lost == '0' else 'another process'} was lost"
    assert alone(tmp_path, options(tiny, out, flags)) == (0, "")
    assert only_whole_files(out)
    assert len(finished(out)) == 4 * shards


# Kills


def die_after(seconds):
    """Kill this process with a timer of the kernel, whatever it is doing then."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)


def die_changing(place, operation):
    """Kill this process before the given change (open, rename, remove or mkdir) in `place`, counted from 1."""
    left = [operation]

    def watch(event, args):
        writes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in ("os.rename", "os.remove", "os.mkdir")) and str(args[0]).startswith(place):
            left[0] -= 1
            if not left[0]:
                send(signal.SIGKILL)

    sys.addaudithook(watch)


def die_writing(size):
    """Kill this process in the middle of the write that makes a file larger than `size` bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.slow
def test_job_killed_twenty_times_writes_the_files_of_an_undisturbed_one(tmp_path):
    """Before a change of its files, in the middle of a write, or at a random time; each kill takes effect."""
    model, rng = save_tiny(tmp_path / "model", num_class_embeds=3), np.random.default_rng(0)
    flags = "--num-samples 300 --class-labels 2,0,1,1 --shard-size 3 --batch-size 2 --format png --quiet"
    assert alone(tmp_path, options(model, tmp_path / "want", flags)) == (0, "")
    want, out, reached = contents(tmp_path / "want"), tmp_path / "out", [0]
    for kill in range(20):
        if kill % 3 == 0:
            hook, by = functools.partial(die_changing, f"{out}/", int(rng.integers(1, 30))), signal.SIGKILL
        elif kill % 3 == 1:
            hook, by = functools.partial(die_after, rng.uniform(0.01, 0.5)), signal.SIGALRM
        else:
            hook, by = functools.partial(die_writing, int(rng.integers(1, 60))), signal.SIGXFSZ
        got, output = alone(tmp_path, options(model, out, flags), hook, functools.partial(slowly, 0.05))
        assert (got, output) == (-by, ""), kill
        reached.append(len(finished(out)) if (out / "manifest.json").exists() else 0)
    assert reached == sorted(reached)
    assert len(set(reached)) > 3  # there was progress between the kills, also if no timed one leaves time for a shard
    assert reached[-1] < 300
    assert alone(tmp_path, options(model, out, flags), functools.partial(note_drawn, tmp_path)) == (0, "")
    assert len(drawn(tmp_path)[0]) == 300 - reached[-1]
    assert contents(out) == want


@pytest.mark.slow
@pytest.mark.parametrize("form", ["png", "npz"])
def test_growth_killed_anywhere_writes_the_files_of_an_undisturbed_one(tmp_path, form):
    """Before each change of its files in turn, until one kill comes too late."""
    model = save_tiny(tmp_path / "model", num_class_embeds=3)
    flags = f"--class-labels 2,0,1 --shard-size 3 --batch-size 2 --format {form} --quiet --num-samples"
    for folder, counts in (("want", (4, 8)), ("out", (4,))):
        for count in counts:
            assert main(options(model, tmp_path / folder, f"{flags} {count}")) == 0
    want, out = contents(tmp_path / "want"), tmp_path / "out"
    before = {name: content for name, content in contents(out).items() if name not in ("manifest.json", "dataset.json")}
    for kill in range(1, 60):
        hook = functools.partial(die_changing, f"{out}/", kill)
        status, output = alone(tmp_path, options(model, out, f"{flags} 8"), hook)
        assert (status, output) in ((-signal.SIGKILL, ""), (0, ""))
        assert before.items() <= contents(out).items()
        if status == 0:
            break
    assert kill > 3
    assert contents(out) == want


# Under torchrun itself


def torchrun(*arguments, restarts=0, script=("-m", "fastddpm")):
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.Popen(
        [*run, f"--max-restarts={restarts}", *script, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_torchrun_job_writes_the_files_of_one_process(tiny, undisturbed, tmp_path):
    out = tmp_path / "out"
    process = torchrun(*options(tiny, out, FLAGS.replace("--quiet", "")))
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert re.fullmatch(rf"{out}: all 9 samples are done; [\d.]+ s this time\n", stdout)
    assert "9 of 9 samples" in stderr
    assert "Traceback" not in stderr
    assert contents(out) == undisturbed


ONCE = """
import os, signal, sys
from pathlib import Path
from fastddpm import cli
from fastddpm.storage.shards import ShardFolder

write, marker = ShardFolder.write, Path(sys.argv.pop(1))

def killed(self, k, samples):
    if k == 3 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, k, samples)

ShardFolder.write = killed
sys.exit(cli.main())
"""


@pytest.mark.slow
def test_torchrun_restarts_a_killed_process(tiny, undisturbed, tmp_path):
    out, script, marker = tmp_path / "out", tmp_path / "once.py", tmp_path / "killed"
    script.write_text(ONCE)
    process = torchrun(str(marker), *options(tiny, out, FLAGS), restarts=1, script=(str(script),))
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert marker.exists()
    assert contents(out) == undisturbed


@pytest.mark.slow
def test_torchrun_forwards_a_signal(tiny, tmp_path):
    """All processes end and keep finished shards; one prints how many samples are done."""
    out = tmp_path / "out"
    process = torchrun(*options(tiny, out, f"{FLAGS} --num-samples 100000"))
    wait_for(out / ".shards" / "00009", 120)
    process.terminate()
    _, stderr = process.communicate(timeout=120)
    assert process.returncode not in (0, -signal.SIGKILL)
    assert (
        len(re.findall(r"fastddpm: stopped: \d+ of 100000 samples are done; the same command resumes the job", stderr))
        == 1
    )
    with locked(out):  # no process still writes there
        done = finished(out)
        assert only_whole_files(out)
    assert 10 <= len(done) < 100_000  # at least the five shards of the process that wrote 00009


class Finalised:
    """Sends SIGTERM to this process while Python runs a finaliser, whose exceptions are ignored."""

    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_signal_during_a_finaliser_ends_a_job(tiny, tmp_path, monkeypatch, capsys):
    write, drawing = ShardFolder.write, Sampler.sample

    def once(self, samples, **settings):
        if list(samples) == [2, 3]:
            Finalised()
        return drawing(self, samples, **settings)

    monkeypatch.setattr(Sampler, "sample", once)
    monkeypatch.setattr(ShardFolder, "write", lambda self, k, samples: write(self, k, samples))
    assert main(options(tiny, tmp_path / "out", FLAGS)) == 143
    assert capsys.readouterr().err.endswith("samples are done; the same command resumes the job\n")
    assert len(ShardFolder.open(tmp_path / "out").samples) == 9
    assert not ShardFolder.open(tmp_path / "out").is_done(1)


def test_shard_left_by_another_job_is_not_counted(tiny, undisturbed, tmp_path):
    """As from a job that hangs in a write while its folder is deleted and created again with another seed."""
    out, other = tmp_path / "out", tmp_path / "other"
    assert main(options(tiny, out, FLAGS)) == 0
    assert main(options(tiny, other, f"{FLAGS} --seed 5")) == 0
    for name in ("00001.npz", ".shards/00001"):
        (other / name).rename(out / name)
    assert [ShardFolder.open(out).is_done(k) for k in range(5)] == [True, False, True, True, True]
    assert main(options(tiny, out, FLAGS)) == 0
    assert contents(out) == undisturbed


def test_processes_with_other_options_are_refused(tiny, tmp_path):
    statuses, outputs = run_ranks(tmp_path, 2, by_rank, str(tiny), str(tmp_path / "out"))
    assert statuses == [2, 2]
    assert {error(text) for text in outputs} == {
        "seed is 0 in process 0, 1 in process 1; give all of them the same data, options and folder"
    }
    assert not (tmp_path / "out").exists()


def by_rank(model, out):
    return main(options(model, out, f"{FLAGS} --seed {os.environ['RANK']}"))


def run_with_a_silent_process():
    """Process 1 posts no counts, as if it were suspended or its machine were lost."""
    progress.BEAT, progress.SILENT = 0.02, 50
    with ranks("cpu") as group, JobProgress(group, 1, total=2, before=0, steps=1, show=False) as job_progress:
        if group.rank == 1:
            job_progress._post = lambda: None
        while True:
            job_progress.check()
            time.sleep(0.01)


def test_silent_process_is_reported(tmp_path):
    _, outputs = run_ranks(tmp_path, 2, run_with_a_silent_process)
    for text in outputs:
        assert text.splitlines()[-1].endswith("AgreedError: process 1 has given no sign of life for 1 seconds")


@pytest.mark.slow
@pytest.mark.parametrize("redirected", ["2>&-", "2>/dev/full"])
def test_job_ends_well_without_stderr(tiny, undisturbed, tmp_path, redirected):
    """Its files and its status are those of a job that can show its progress."""
    out = tmp_path / "out"
    run = [sys.executable, "-m", "fastddpm", *options(tiny, out, FLAGS.replace("--quiet", ""))]
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {redirected}', "sh", *run], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert re.fullmatch(rf"{out}: all 9 samples are done; [\d.]+ s this time\n", done.stdout)
    assert contents(out) == undisturbed
