"""The commands in --help, README.md and docs/ are valid, and the Python snippets of README.md and the guide run."""

import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest

from fastddpm.cli.main import COMMANDS, command_parser

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def code_blocks(markdown, languages):
    """The contents of the fenced code blocks in these languages."""
    blocks = re.findall(r"^ *(?:```|:::)\{?([\w-]*)\}?[^\n]*\n(.*?)^ *(?:```|:::)", markdown, re.MULTILINE | re.DOTALL)
    return [code for language, code in blocks if language in languages]


def commands(text):
    """The arguments of each `fastddpm` that a line of text starts, as a string, without comments and pipes."""
    names = "|".join(COMMANDS)
    for line in re.sub(r"\s*\\\n\s*", " ", text).splitlines():
        code = re.split(r"(?:^|\s)#", line)[0]
        started = re.match(rf"(?:.*[\s/])?fastddpm +((?:{names})\b.*)", code)
        if started:
            yield re.split("  |[|;&>]", started[1])[0].strip()


def all_commands():
    for command in COMMANDS.values():
        yield from commands(command.EPILOG)
    for page in PAGES:
        for block in code_blocks(page.read_text(), ("", "bash", "console", "sh", "shell", "text")):
            yield from commands(block)


def test_commands_are_found():
    text = """fastddpm sample            # the bundled model
$ .venv/bin/fastddpm sample runs/mine \\
    --steps 5 > log
torchrun -m fastddpm train x.npz --out run    resumes
make sample
import fastddpm
# then fastddpm fid
fastddpm: error: no
16 samples by fastddpm samples
"""
    assert [*commands(text)] == [
        "sample",
        "sample runs/mine --steps 5",
        "train x.npz --out run",
    ]
    assert code_blocks("a\n```bash\nb\n```\n```python\nc\n```\n", ("bash",)) == ["b\n"]
    for name, command in COMMANDS.items():
        assert any(line.split()[0] == name for line in commands(command.EPILOG))


@pytest.mark.parametrize("line", sorted(set(all_commands())))
def test_documented_command_is_valid(line):
    command_parser().parse_args(shlex.split(line))


@pytest.mark.parametrize("page", ["README.md", "docs/guide.md", "docs/gpu.md"])
def test_python_runs(page, tiny, monkeypatch):
    monkeypatch.setattr("fastddpm.checkpoints.shipped.FOLDER", tiny)
    names: dict = {}
    blocks = code_blocks((ROOT / page).read_text(), ("python",))
    assert blocks
    for code in blocks:
        if "diffusers" in code and not find_spec("diffusers"):
            continue
        for documented, here in (
            ("google/ddpm-cifar10-32", tiny),
            ("250", "5"),
            ('"cuda"', '"cpu"'),
            ('"graph"', '"eager"'),
        ):
            code = code.replace(documented, here)
        exec(code, names)
