"""`fastddpm merge`: the file it writes, and its errors."""

from pathlib import Path

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
