"""`fastddpm merge`: the file it writes, and its errors."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fastddpm.cli.main import main
from tests.support.command_line import error_line


def test_merged_folder_equals_the_file_sampled_at_once(tiny, capsys):
    for out in ("one.npz", "shards/"):
        flags = ["--num-samples", "5", "--batch-size", "2", "--format", "npz", "--out", out, "--quiet"]
        assert main(["sample", tiny, *flags]) == 0
    assert main(["merge", "shards", "merged.npz"]) == 0
    assert Path("merged.npz").read_bytes() == Path("one.npz").read_bytes()
    assert capsys.readouterr().out == "merged.npz: 5 samples, each 4 x 4 x 1\n"
    assert "shards has" not in error_line(["merge", "shards", "merged.zip"], capsys)
    assert "nowhere has no manifest.json" in error_line(["merge", "nowhere", "merged.npz"], capsys)


DYING = """
import os, signal, sys
from fastddpm.cli.main import main
from fastddpm.storage.shards import ShardFolder

read = ShardFolder.read
def killed(self, k):
    if k == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return read(self, k)

ShardFolder.read = killed
main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["merged.npz", "merged.tar", f"{'n' * 251}.npz"], ids=lambda name: name[:10])
def test_killed_merge_is_cleared_away_by_the_next(tiny, name):
    """And nothing else is."""
    flags = ["--num-samples", "5", "--batch-size", "2", "--format", "npz", "--out", "shards/", "--quiet"]
    assert main(["sample", tiny, *flags]) == 0
    Path(f".{name[:20]}.123.tmp").write_text("the user's own")
    before = sorted(os.listdir())
    command = [sys.executable, "-c", DYING, "merge", "shards", name]
    for _ in range(2):
        assert subprocess.run(command, capture_output=True, check=False).returncode == -signal.SIGKILL
        (left,) = set(os.listdir()) - set(before)
        assert left.endswith(".fastddpm-tmp")
    assert main(["merge", "shards", name, "--quiet"]) == 0
    assert sorted(os.listdir()) == sorted([*before, name])
