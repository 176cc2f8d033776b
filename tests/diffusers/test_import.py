"""What importing the drop-in loads, and its errors."""

import subprocess
import sys

import pytest

pytest.importorskip("diffusers")


def last_line(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return (done.stdout + done.stderr).strip().splitlines()[-1]


def test_fastddpm_does_not_import_diffusers():
    code = "import sys, fastddpm; print('diffusers' in sys.modules, callable(fastddpm.accelerate), 'accelerate')"
    assert last_line(code) == "False True accelerate"


def test_an_unknown_name_raises_attribute_error():
    assert last_line("import fastddpm; fastddpm.speed") == (
        "AttributeError: module 'fastddpm' has no attribute 'speed'"
    )


@pytest.mark.parametrize("diffusers", ["None", "types.SimpleNamespace(__version__='0.34.0')"])
def test_a_missing_or_old_diffusers_is_reported_with_the_way_out(diffusers):
    line = last_line(f"import sys, types; sys.modules['diffusers'] = {diffusers}; import fastddpm.diffusers")
    assert line.startswith("ImportError: fastddpm.diffusers needs diffusers 0.35 or newer: pip install ")
    assert ("halted; None in sys.modules)" if diffusers == "None" else "(diffusers is 0.34.0)") in line
