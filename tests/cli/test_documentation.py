"""The commands in --help, README.md and the other pages are valid."""

import re
import shlex
from pathlib import Path

import pytest

from fastddpm.cli.main import COMMANDS, command_parser

ROOT = Path(__file__).parents[2]
OTHERS = [*(ROOT / "fastddpm/models").glob("*/README.md"), ROOT / "bench/NOTES.md"]
PAGES = [*ROOT.glob("*.md"), *sorted((ROOT / "docs").glob("*.md")), *OTHERS]


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
        yield from inline_commands(page.read_text())


def inline_commands(markdown):
    """Those in single backticks that have arguments and leave nothing out."""
    for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", markdown):
        if "..." not in code and "--help" not in code and len(code.split()) > 2:
            yield from commands(" ".join(code.split()))


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
    inline = "`fastddpm sample\n--steps 5` `fastddpm train` `fastddpm train x.npz ...`\n```\nfastddpm info --cc 90\n```"
    assert [*inline_commands(inline)] == ["sample --steps 5"]
    assert code_blocks("a\n```bash\nb\n```\n```python\nc\n```\n", ("bash",)) == ["b\n"]
    for name, command in COMMANDS.items():
        assert any(line.split()[0] == name for line in commands(command.EPILOG))


@pytest.mark.parametrize("line", sorted(set(all_commands())))
def test_documented_command_is_valid(line):
    command_parser().parse_args(shlex.split(line))
