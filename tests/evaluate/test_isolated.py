"""Extractors in a process of their own: equal features, errors in place of crashes, and no way to write files."""

import gc
import os
import signal
import subprocess
import sys
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastddpm.evaluate import features, isolated
from fastddpm.evaluate.fid import fid
from fastddpm.evaluate.isolated import load_extractor
from tests.evaluate.test_features_onnx import graph
from tests.support.check import error_line

IMAGES = np.random.default_rng(7).integers(0, 256, (5, 4, 6, 3), np.uint8)
SECRET = b"precious" * 8


class Means(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


class Talks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        print("a reply?")
        return x.mean((2, 3))


class Overwrites(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        victim = torch.from_file("victim", True, 64, dtype=torch.uint8)
        victim.fill_(88)
        return x.mean((2, 3)) + victim.float().sum()


class Grows(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        means = x.mean((2, 3))
        return means + torch.zeros(len(x), 1 << 50)[:, :3] if len(x) > 3 else means


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def saved(net: nn.Module, path: str = "net.pt") -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(net), path)
    return path


def loaded(path: str) -> features.Extractor:
    return load_extractor(path, device="cpu", input_size=0)


def loaded_here(path: str) -> features.Extractor:
    return features.load_extractor(path, device="cpu", input_size=0)


@pytest.mark.parametrize("make", [lambda: saved(Means()), lambda: graph("net.onnx")], ids=["torchscript", "onnx"])
def test_an_extractor_is_the_same_in_a_process_of_its_own(make):
    path = make()
    one, other = loaded(path), loaded_here(path)
    fields = ("name", "identity", "channels", "size", "scale", "device")
    assert [getattr(one, name) for name in fields] == [getattr(other, name) for name in fields]
    assert torch.equal(one(IMAGES), other(IMAGES))
    assert torch.equal(one(IMAGES[:2]), one(IMAGES)[:2])


def test_the_bundled_classifier_runs_in_this_process(monkeypatch):
    monkeypatch.setattr(isolated, "_Process", None)
    assert load_extractor(device="cpu").name == "fashion-mnist"


def test_what_a_network_prints_is_no_reply(capfd):
    extractor = loaded(saved(Talks()))
    assert torch.equal(extractor(IMAGES), loaded_here(saved(Means()))(IMAGES))
    assert capfd.readouterr() == ("", "")


def test_errors_are_those_of_an_extractor_in_this_process():
    Path("text.pt").write_text("no network")
    assert error_line(loaded, "text.pt") == error_line(loaded_here, "text.pt")
    wrong = saved(nn.Flatten(0))
    assert error_line(loaded(wrong), IMAGES) == error_line(loaded_here(wrong), IMAGES)
    assert "there is no file absent.pt" in error_line(loaded, "absent.pt")


def test_memory_that_runs_out_there_halves_the_batch_here():
    extractor = loaded(saved(Grows()))
    with pytest.warns(UserWarning, match="out of memory; continuing with batches of 3"):
        found = features.extract(extractor, [IMAGES], 5, batch_size=5, progress=False)
    assert torch.equal(found, loaded_here(saved(Means()))(IMAGES))


def test_a_file_that_crashes_torchscript_is_an_error():
    """Its data.pkl nests a million tuples."""
    with zipfile.ZipFile(saved(Means())) as whole, zipfile.ZipFile("nested.pt", "w") as nested:
        for member in whole.infolist():
            content = (
                b"\x80\x02)" + b"\x85" * 1_000_000 + b"."
                if member.filename.endswith("/data.pkl")
                else whole.read(member)
            )
            nested.writestr(member, content)
    line = error_line(loaded, "nested.pt")
    assert line.startswith("nested.pt crashed the process that ran it (SIGSEGV): it is damaged, or made for another")


def test_a_network_that_crashes_is_an_error():
    extractor = loaded(saved(Means()))
    process = extractor.network.__self__.process
    os.kill(process.pid, signal.SIGKILL)
    assert error_line(extractor, IMAGES).startswith("net.pt crashed the process that ran it (SIGKILL): ")


def test_a_network_cannot_write_files():
    Path("victim").write_bytes(SECRET)
    np.savez("images.npz", IMAGES)
    saved(Overwrites())
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        line = error_line(fid, "images.npz", "images.npz", features="net.pt", device="cpu", cache=False, progress=False)
    if any("cannot keep it from writing" in str(each.message) for each in warned):
        pytest.skip("the kernel has no Landlock")
    assert line.startswith("net.pt fails on [5, 3, 299, 299] float32: ")
    assert Path("victim").read_bytes() == SECRET


CONFINED = """
import os, sys
from fastddpm.evaluate.isolated import forbid_writing
if not forbid_writing():
    sys.exit("none")
attempts = {
    "read": lambda: open("victim").read(),
    "overwrite": lambda: open("victim", "r+"),
    "append": lambda: open("victim", "a"),
    "create": lambda: open("new", "x"),
    "remove": lambda: os.remove("victim"),
    "rename": lambda: os.rename("victim", "other"),
    "link": lambda: os.symlink("victim", "link"),
    "folder": lambda: os.mkdir("folder"),
    "child": lambda: os.system("rm victim") and os.stat("missing"),
}
for name, attempt in attempts.items():
    try:
        attempt()
        print(name, "done")
    except OSError:
        print(name, "refused")
"""


def test_a_confined_process_reads_but_does_not_write():
    Path("victim").write_bytes(SECRET)
    done = subprocess.run([sys.executable, "-c", CONFINED], capture_output=True, text=True, check=False)
    if done.stderr == "none\n":
        pytest.skip("the kernel has no Landlock")
    results = dict(line.split() for line in done.stdout.splitlines())
    assert results.pop("read") == "done"
    assert len(results) == 8
    assert set(results.values()) == {"refused"}
    assert os.listdir() == ["victim"]


@pytest.mark.parametrize(("path", "warns"), [("net.pt", True), ("net.onnx", False)])
def test_torchscript_that_could_write_is_warned_of(path, warns, monkeypatch):
    """The process is this one: as on a system that cannot confine it."""
    saved(Means()) if warns else graph(path)

    class Here:
        extract = None

        def __init__(self, name):
            pass

        def ask(self, request):
            return {"name": path, "identity": "", "channels": 3, "size": [4, 6], "scale": "fid", "confined": False}, b""

    monkeypatch.setattr(isolated, "_Process", Here)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert loaded(path).size == (4, 6)
    want = "net.pt is TorchScript, which can run any code, and this system cannot keep it from writing files; use only"
    assert [str(each.message).startswith(want) for each in warned] == [True] * warns


def test_the_process_ends_with_its_extractor():
    extractor = loaded(saved(Means()))
    process = extractor.network.__self__.process
    assert process.poll() is None
    del extractor
    gc.collect()
    assert process.poll() is not None


class Endless(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        while bool(x.numel() > 0):
            x = x + 1
        return x.flatten(1)


def test_a_reply_that_was_not_read_is_given_to_no_later_call(monkeypatch):
    """After Ctrl-C."""
    extractor = loaded(saved(Means()))
    receive = isolated._receive
    monkeypatch.setattr(isolated, "_receive", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        extractor(IMAGES)
    monkeypatch.setattr(isolated, "_receive", receive)
    with pytest.raises(ValueError, match=r"an earlier call of net\.pt did not end; load the extractor again"):
        extractor(IMAGES)


def test_threads_may_share_an_extractor():
    extractor = loaded(saved(Means()))
    batches = [np.full_like(IMAGES, value) for value in range(8)]
    want = [extractor(batch) for batch in batches]
    with ThreadPoolExecutor(8) as pool:
        for got, expected in zip(pool.map(extractor, batches), want, strict=True):
            assert torch.equal(got, expected)


@pytest.mark.slow
@pytest.mark.parametrize("work", ["time.sleep(600)", "e(np.zeros((1, 4, 6, 3), np.uint8))"], ids=["idle", "busy"])
def test_the_process_ends_with_a_program_that_is_killed(work):
    saved(Means() if "sleep" in work else Endless())
    code = (
        "import os, time; import numpy as np; from fastddpm.evaluate.isolated import load_extractor;"
        "e = load_extractor('net.pt', device='cpu', input_size=0, scale='unit');"
        f"print(e.network.__self__.process.pid, flush=True); {work}"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as program:
        child = int(program.stdout.readline())
        time.sleep(1)  # the network runs
        program.kill()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{child}").exists()


def test_names_that_are_not_utf8():
    torchscript, onnx = os.fsdecode(b"\xe9.pt"), os.fsdecode(b"\xe9.onnx")
    os.rename(saved(Means()), torchscript)
    os.rename(graph("net.onnx"), onnx)
    assert loaded(torchscript)(IMAGES).shape == (5, 3)
    assert loaded_here(onnx)(IMAGES).shape == (5, 72)
