"""What the command line writes: streams that fail, encodings, and messages with hostile names."""

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings

import pytest

from fastddpm.cli import merge, terminal
from fastddpm.cli.main import main
from tests.support.command_line import error_line

FASTDDPM = [sys.executable, "-m", "fastddpm"]


@pytest.fixture
def answers(monkeypatch):
    """answers(run) makes run(args) the work of `fastddpm merge a b`; returns its exit status."""

    def run(work):
        monkeypatch.setattr(merge, "run", work)
        return main(["merge", "a", "b"])

    return run


def raising(error):
    def work(args):
        raise error

    return work


def shell(redirection, *arguments, **environment):
    """The exit status of a command with a shell's redirection, and what it wrote to the streams that are left."""
    command = 'exec "$0" -m fastddpm "$@" ' + redirection
    run = ["bash", "-c", command, sys.executable, *arguments]
    return subprocess.run(run, env=os.environ | environment, capture_output=True, check=False)


@pytest.mark.parametrize("redirection", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-", "2>/dev/full", ">&- 2>/dev/full"])
def test_the_work_is_finished_without_its_streams(redirection, tiny, tmp_path):
    done = shell(redirection, "sample", tiny, "--num-samples", "2", "--out", "x.npz")
    assert (done.returncode, (tmp_path / "x.npz").is_file()) == (0, True)
    assert b"Traceback" not in done.stderr + done.stdout
    assert ((tmp_path / "x.npz").read_bytes())[:2] == b"PK"  # no bar was written into it


@pytest.mark.parametrize("arguments", [["info", "--nothing"], ["fid", "nowhere", "nowhere"]])
@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full"])
def test_an_error_that_cannot_be_told_exits_with_2(redirection, arguments):
    assert shell(redirection, *arguments).returncode == 2


def test_a_closed_pipe_of_stderr_does_not_stop_the_work(tiny, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    run = [*FASTDDPM, "sample", tiny, "--num-samples", "2", "--out", "x.npz"]
    done = subprocess.run(run, stdout=subprocess.PIPE, stderr=writer, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stdout.split(":")[0]) == (0, "x.npz")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["sample", "MODEL", "--out", "x.npz"]])
def test_a_full_disk_behind_stdout_is_an_error_after_the_work(arguments, tiny, tmp_path):
    done = shell(">/dev/full", *(tiny if word == "MODEL" else word for word in arguments))
    assert done.returncode == 2
    assert b"fastddpm: error: stdout could not be written, so what was printed is lost: [Errno 28]" in done.stderr
    assert b"Traceback" not in done.stderr
    assert (tmp_path / "x.npz").is_file() == ("x.npz" in arguments)


@pytest.mark.parametrize("encoding", ["ascii", "ascii:strict", "cp932", "koi8-r", "utf-16"])
def test_every_encoding_can_be_written(encoding):
    environment = {"PYTHONIOENCODING": encoding}
    for arguments in (["--help"], ["fid", "--help"]):
        done = shell("", *arguments, **environment)
        assert (done.returncode, done.stderr) == (0, b"")
    text = done.stdout.decode(encoding.partition(":")[0])
    assert "chet distance between" in text
    assert shell("", "fid", "図", "b", **environment).returncode == 2


def test_results_survive_names_that_are_not_utf8(capfdbinary, answers):
    name = os.fsdecode(b"fr\xe9chet\xff")
    assert answers(lambda args: print(f"{name}: 3 samples, ± 0.1")) == 0
    assert capfdbinary.readouterr().out == b"fr\\udce9chet\\udcff: 3 samples, \xc2\xb1 0.1\n"


def test_results_have_no_escape_sequences_and_bars_move(capsys, answers):
    def work(args):
        print("a\x1b[2Jb\tc\rd\u202e\ne")
        print("\r 50%\x1b[A\x1b[31m\x07", file=sys.stderr)

    assert answers(work) == 0
    assert capsys.readouterr() == ("a\\x1b[2Jb\tc\\rd\\u202e\ne\n", "\r 50%\x1b[A\\x1b[31m\\x07\n")


HOSTILE = "\x1b]0;title\x07\x1b[31mred\udce9\x00\u202e\x85"


@pytest.mark.parametrize(
    "name", [HOSTILE, "n" * 100_000, "a " * 50_000, "図" * 30_000], ids=["escapes", "long", "words", "wide"]
)
def test_errors_and_warnings_are_one_short_line_that_can_be_printed(name, capsys, answers):
    def work(args):
        sys.stderr.write(warnings.formatwarning(UserWarning(f"{name} is odd\nand more"), UserWarning, "file.py", 7))
        raise ValueError(f"{name}\nis wrong; want another")

    assert answers(work) == 2
    warning, error = capsys.readouterr().err.splitlines()
    for line, end in ((warning, "is odd and more"), (error, "is wrong; want another")):
        assert line.isprintable()
        assert len(line) < 4200
        assert line.endswith(end)
    assert warning.startswith("fastddpm: warning: ")
    assert error.startswith("fastddpm: error: ")


def test_warnings_are_one_line_without_source_code():
    code = """
import sys, warnings
from fastddpm.cli import main, merge
merge.run = lambda args: warnings.warn("it is\\nodd")
sys.exit(main(["merge", "a", "b"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "fastddpm: warning: it is odd\n"


@pytest.mark.parametrize("option", ["--{}", "--device={}", "--steps={}"])
def test_errors_in_options_can_be_printed(option, capsys):
    line = error_line(["verify", "--quiet", option.format(HOSTILE + "n" * 100_000)], capsys)
    assert line.rstrip("\n").isprintable()
    assert len(line) < 4200


INPUTS = ["sample NAME", "verify NAME --quiet", "train NAME --out run", "train images.npz --out run --init NAME"]
INPUTS += ["likelihood TINY NAME --quiet", "fid NAME images.npz --quiet", "fid images.npz NAME --quiet"]
INPUTS += ["fid images.npz images.npz --features NAME --quiet", "merge NAME x.npz"]
OUTPUTS = ["train images.npz --out NAME", "merge samples NAME.npz", "likelihood TINY images.npz --out NAME.npz --quiet"]
OUTPUTS += ["likelihood TINY images.npz --plot NAME.png --quiet", "train images.npz --out run --json-log NAME"]


@pytest.mark.parametrize(
    "name", ["n" * 100_000, "a/" * 5000, "a\0b", "\ud800"], ids=["long", "deep", "nul", "surrogate"]
)
@pytest.mark.parametrize("arguments", INPUTS + OUTPUTS)
def test_names_that_no_file_can_have_are_explained(arguments, name, tiny, images_with_labels, capsys):
    main(["sample", tiny, "--num-samples", "1", "--out", "samples/", "--quiet"])
    words = [word.replace("NAME", name).replace("TINY", tiny) for word in arguments.split()]
    line = error_line(words, capsys)
    assert not re.search("Errno|embedded|codec|--debug", line)
    assert len(line) < 4200


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MemoryError(), "out of memory; ask for less at a time, such as a smaller --batch-size (MemoryError)"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte"),
            "out of memory; ask for less at a time, such as a smaller --batch-size (DefaultCPUAllocator: can't "
            "allocate memory: you tried to allocate 1 byte) (--debug shows where)",
        ),
        (RecursionError("too deep"), "RecursionError: too deep (--debug shows where)"),
        (NotImplementedError(), "NotImplementedError (--debug shows where)"),
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x.npz"),
            "[Errno 28] No space left on device: 'x.npz'; free some space there, or write to another place",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "x"), "[Errno 13] Permission denied: 'x'"),
    ],
)
def test_errors_of_the_machine_name_a_way_out(error, line, capsys, answers):
    assert answers(raising(error)) == 2
    assert capsys.readouterr().err == f"fastddpm: error: {line}\n"


def test_the_streams_are_put_back(monkeypatch):
    before = sys.stdout, sys.stderr, warnings.formatwarning
    with terminal.streams():
        assert isinstance(sys.stdout, terminal.Stream)
    assert (sys.stdout, sys.stderr, warnings.formatwarning) == before


def test_a_stream_tells_its_first_failure():
    stream = terminal.Stream(io.StringIO(), errors="replace", kept="\n")
    stream.write("a\n")
    assert stream.failure is None
    stream.stream.close()
    stream.write("b\n")
    stream.flush()
    assert isinstance(stream.failure, ValueError)


@pytest.mark.parametrize("seconds", [0.1, 0.2, 0.4, 0.8, 1.6])
def test_ctrl_c_exits_with_130_while_torch_is_imported(seconds, tmp_path):
    """The clock starts when Python has started: an earlier Ctrl-C is Python's."""
    code = "print(flush=True); from fastddpm.cli import main; import sys; sys.exit(main(['info']))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    process.stdout.readline()
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode in (130, 0, -signal.SIGINT)  # 0: it was done; -2: and Python was about to exit
    assert "Traceback" not in err


def test_json_of_a_command_is_not_changed(capsys, answers):
    text = json.dumps({"path": HOSTILE.replace("\udce9", ""), "text": "é\n"})
    assert answers(lambda args: print(text)) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(text)
