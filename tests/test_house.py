"""The house: who may import whom, what an import costs, what is installed, and what the README's commands run."""

import ast
import email
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fastddpm

ROOT = Path(__file__).parents[1]

# From the top down: a room, and its files. A file imports only what is further down; neighbours joined by "|" never
# import each other. In each room __init__ is on top: it only gathers names.
ORDER = """
__main__
cli: main sample outputs conditions trajectory merge train likelihood labels fid convert verify info options terminal
verify: table ladder interpreter rungs sampling_rungs kernel_rungs forward_rung case accuracy
train: trainer loss initial grids batches run_folder state updates options
| evaluate: likelihood terms fid isolated features frechet
| diffusers: accelerating decoding pipelines captured unet obstacles schedulers scheduler_base noise_sources tables \
             disguise
sampling: job manifest sampler parallel run condition_arguments beginning arguments loop watch batches engine \
          runner chains buffers batch_network replay model own_network conditions capture fixed_reads reachable
checkpoints: loading diffusers guided_diffusion flags lucidrains lerobot files weights checkpoint parameters medium \
             reading shipped
networks: fused planned_unet1d planned fused_unet1d unet1d unet2d obstacles config resnet layers
processes: progress displays distributed signals
storage: datasets sequences merge shards shard_formats trajectory sequence_files audio class_grid images plots \
         image_folder archives image_files classes decoding npz idx arrays data_checks fingerprint indices files caches
ops: eps_loss x_0_error group_norm interleave noising predict_step normal residual parallel_steps conditional_step \
     step checks library backend
text
| audio
core: noise schedule table betas layout precision memory checks names
reference: likelihood unet1d unet parallel conditional diffusion
kernels: report eps_loss x_0_error group_norm interleave noising predict_step normal residual draft \
         first_difference commit conditional_step step tree philox block columns launch
| kernels.cpu: program launch native
_moved
_version
"""
PACKAGE = [*sorted((ROOT / "fastddpm").rglob("*.py")), *sorted((ROOT / "kernels").rglob("*.py"))]
APART = ("reference", "kernels", "kernels.cpu")  # rooms that import nothing of the others
LIGHT = {"torch", *sys.stdlib_module_names}
KNOWN = LIGHT | {"numpy", "PIL", "matplotlib", "tqdm", "safetensors", "huggingface_hub", "onnxruntime", "soundfile"}


def positions():
    """{module: (height, room, place)}: "core.noise" is a file, "core" the __init__ of a room."""
    found = {}
    for height, line in enumerate(reversed(ORDER.replace("\n|", "|").split("\n"))):
        for room in filter(None, line.split("|")):
            name, _, files = room.partition(":")
            found[name.strip()] = height, name.strip(), 0
            found |= {f"{name.strip()}.{file}": (height, name.strip(), i) for i, file in enumerate(files.split(), 1)}
    return found


POSITIONS = positions()


def imported(source, package):
    """Dotted names of all that source imports, at whatever depth; `from a import b` is a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            yield from (".".join([*above, *filter(None, [node.module]), alias.name]) for alias in node.names)


def wrong_imports(source, module):
    """What module (fastddpm.ops, fastddpm.kernels.step, ...) may not import, but does."""
    name = module.removeprefix("fastddpm.")
    height, room, place = POSITIONS[name]
    package = module if place == 0 else module.rpartition(".")[0]
    outside = LIGHT if room in APART else KNOWN
    outside = outside | {"kernels": {"triton"}, "diffusers": {"diffusers"}}.get(room, set())
    for dotted in imported(source, package):
        top, _, inside = dotted.partition(".")
        if top != "fastddpm":
            fine = top in outside
        else:
            parts = inside.split(".")
            target = next((".".join(parts[:n]) for n in (3, 2, 1) if ".".join(parts[:n]) in POSITIONS), None)
            there = POSITIONS.get(target)
            same_room = there is not None and there[1] == room
            fine = there is not None and (there[2] > place if same_room else there[0] < height)
            fine = fine and (same_room or room not in APART)
        if not fine:
            yield dotted


def module_of(path):
    inside = path.relative_to(ROOT).with_suffix("")
    parts = [*(["fastddpm"] if inside.parts[0] == "kernels" else []), *inside.parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def python(code, cwd, **environment):
    """What a fresh python prints, run far from the source tree."""
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_order_names_every_file():
    modules = {module_of(path).removeprefix("fastddpm.") for path in PACKAGE} - {"fastddpm"}
    assert modules == POSITIONS.keys()


@pytest.mark.parametrize("path", PACKAGE, ids=module_of)
def test_imports_point_down(path):
    if path == ROOT / "fastddpm" / "__init__.py":
        return  # gathers the public names
    assert list(wrong_imports(path.read_text(), module_of(path))) == []


WHOLE = {  # functions that are best read whole, though they are longer than 60 lines
    "fastddpm/reference/unet.py": {"__init__"},  # the network, from input to output
    "fastddpm/reference/diffusion.py": {"predict_step"},  # the branches of one formula
    "fastddpm/ops/predict_step.py": {"predict_step"},  # half of it says what its arguments are
    "fastddpm/sampling/job.py": {"sample_to"},  # likewise
    "fastddpm/sampling/sampler.py": {"batches"},  # likewise
}


@pytest.mark.parametrize("path", PACKAGE, ids=module_of)
def test_files_and_functions_are_short(path):
    source, name = path.read_text(), path.relative_to(ROOT).as_posix()
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    long = {node.name for node in functions if node.end_lineno - node.lineno + 1 > 60}
    assert len(source.splitlines()) <= 400
    assert long - WHOLE.get(name, set()) == set()


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        (
            "fastddpm.ops",
            "from fastddpm.core import noise\nfrom fastddpm.sampling import engine",
            ["fastddpm.sampling.engine"],
        ),
        (
            "fastddpm.ops",
            "def f():\n    from fastddpm.networks.unet2d import UNet2D",
            ["fastddpm.networks.unet2d.UNet2D"],
        ),
        ("fastddpm.ops", "import fastddpm.cli as c", ["fastddpm.cli"]),
        ("fastddpm.ops", "from ..train import train", ["fastddpm.train.train"]),
        ("fastddpm.ops", "from fastddpm import Sampler", ["fastddpm.Sampler"]),
        ("fastddpm.ops", "import triton.language as tl", ["triton.language"]),
        ("fastddpm.ops", "from kernels import step", ["kernels.step"]),
        ("fastddpm.core.layout", "from fastddpm.core import noise", ["fastddpm.core.noise"]),
        ("fastddpm.core.noise", "from fastddpm.core import layout", []),
        ("fastddpm.train.trainer", "from fastddpm.evaluate import fid", ["fastddpm.evaluate.fid"]),
        ("fastddpm.train.trainer", "from fastddpm.train import train", ["fastddpm.train.train"]),
        ("fastddpm.cli.main", "import diffusers", ["diffusers"]),
        ("fastddpm.diffusers.unet", "import diffusers, numpy\nfrom fastddpm.diffusers import disguise", []),
        ("fastddpm.diffusers.unet", "from fastddpm.cli import main\nimport triton", ["fastddpm.cli.main", "triton"]),
        ("fastddpm.cli.main", "import fastddpm.kernels.step, tests.check, bench", ["tests.check", "bench"]),
        ("fastddpm.reference.unet", "from fastddpm.reference import diffusion\nimport torch, math", []),
        (
            "fastddpm.reference.unet",
            "import numpy as np\nfrom fastddpm import _version",
            ["numpy", "fastddpm._version"],
        ),
        ("fastddpm.kernels.step", "from .philox import normals\nimport triton, torch", []),
        (
            "fastddpm.kernels.step",
            "from ..core.noise import normal\nimport numpy",
            ["fastddpm.core.noise.normal", "numpy"],
        ),
    ],
)
def test_a_wrong_import_is_seen(module, source, wrong):
    assert list(wrong_imports(source, module)) == wrong


ROOMS = [
    room
    for room in (name for _, name, place in POSITIONS.values() if place == 0)
    if (ROOT / "fastddpm" / room).is_dir()
]


# one statement per line, for one call of ruff
EVERYWHERE = [
    "import triton.language as tl",
    "from kernels import step",
    "from fastddpm.kernels import step",
    "from PIL import Image",
    "import tests.support.check",
    "import bench",
]
FORBIDDEN = {
    "kernels": [
        "import fastddpm",
        "def f(): from fastddpm.core.noise import normal",
        "from ..core.noise import normal",
        "import diffusers",
    ],
    **{f"fastddpm/{room}": [*EVERYWHERE, "def f(): import diffusers"] for room in ROOMS},
    "fastddpm/diffusers": EVERYWHERE,
    "fastddpm/reference": [*EVERYWHERE, "import diffusers", "import numpy as np", "from fastddpm.core import noise"],
    "tests": ["import kernels.step"],
    "bench": ["from kernels import step"],
}


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_ruff_forbids(folder):
    found = ruff(f"{folder}/new.py", "\n".join(FORBIDDEN[folder]))
    flagged = {int(line) for line in re.findall(r"new\.py:(\d+):\d+: TID25", found)}
    assert [source for n, source in enumerate(FORBIDDEN[folder], 1) if n not in flagged] == []


@pytest.mark.parametrize("room", ROOMS)
def test_ruff_forbids_the_rooms_above_and_beside(room):
    height = POSITIONS[room][0]
    upper = [other for other in ROOMS if other != room and POSITIONS[other][0] >= height]
    found = ruff(f"fastddpm/{room}/new.py", "".join(f"import fastddpm.{other}\n" for other in upper))
    assert [other for other in upper if f"`fastddpm.{other}` is banned" not in found] == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("kernels/new.py", "import torch\nimport triton\nfrom .philox import normals"),
        (
            "fastddpm/ops/new.py",
            "import torch\nfrom fastddpm.core import noise\ndef f():\n    import fastddpm.kernels.step",
        ),
        ("fastddpm/diffusers/new.py", "import diffusers"),
        ("fastddpm/reference/new.py", "import torch\nfrom fastddpm.reference import diffusion"),
        ("tests/new.py", "import diffusers\nimport triton\nimport fastddpm.kernels.step"),
        ("bench/new.py", "import diffusers\nimport triton\nimport fastddpm.cli"),
    ],
)
def test_ruff_allows(path, source):
    assert "TID25" not in ruff(path, source)


def ruff(path, source):
    run = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--no-cache",
        "--output-format=concise",
        f"--stdin-filename={path}",
        "-",
    ]
    done = subprocess.run(run, cwd=ROOT, input=source, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    return done.stdout


def test_import_is_cheap(tmp_path):
    code = "import torch, time; t = time.perf_counter(); import fastddpm; print(time.perf_counter() - t)"
    seconds = []
    while len(seconds) < 8 and not (seconds and min(seconds) <= 0.2):
        seconds.append(float(python(code, tmp_path)))
    assert min(seconds) <= 0.2


def test_import_loads_little_and_touches_no_device(tmp_path):
    code = """
import sys, torch
before = set(sys.modules)
import fastddpm
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
assert not torch.cuda.is_initialized()
"""
    loaded = set(python(code, tmp_path).split())
    assert "fastddpm" in loaded
    assert (
        loaded & {"triton", "diffusers", "PIL", "matplotlib", "huggingface_hub", "safetensors", "tqdm", "kernels"}
        == set()
    )


def test_public_names_are_imported_on_first_use(tmp_path):
    code = """
import sys, fastddpm
assert not {"torch", "numpy"} & set(sys.modules)
assert {*fastddpm.__all__, "accelerate"} <= set(dir(fastddpm))
assert not hasattr(fastddpm, "Samplers") and "torch" not in sys.modules
from fastddpm import *
from fastddpm import Sampler as sampler, noise as noise_, ops as ops_
import fastddpm.core.noise, fastddpm.ops, fastddpm.sampling.sampler
assert Sampler is sampler is fastddpm.Sampler is fastddpm.sampling.sampler.Sampler
assert noise is noise_ is fastddpm.noise is fastddpm.core.noise and ops is ops_ is fastddpm.ops
assert {Schedule.__name__, StepTable.__name__, UNet2D.__name__} == {"Schedule", "StepTable", "UNet2D"}
print("ok")
"""
    assert python(code, tmp_path) == "ok"


@pytest.mark.parametrize(("old", "new"), fastddpm._moved.MOVED.items())
def test_import_paths_of_version_0_1_still_work(tmp_path, old, new):
    code = f"""
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import {old} as old
    import {new} as new
    from {old} import __name__ as name
assert old is new and name == new.__spec__.name == "{new}"
assert [str(w.message) for w in caught if w.category is DeprecationWarning] == ["{old} is now {new}"]
print("ok")
"""
    assert python(code, tmp_path) == "ok"


def test_samples_without_triton(tmp_path):
    code = """
import sys
sys.modules["triton"] = None  # import triton fails, as where it is not installed
import torch
from fastddpm.sampling.sampler import Sampler
from fastddpm.core.schedule import Schedule
sampler = Sampler(lambda x, t: x / 2, Schedule(num_train_timesteps=5), shape=(1, 4, 4), device="cpu")
x = sampler.sample(2, progress=False)
assert x.shape == (2, 1, 4, 4) and x.isfinite().all()
assert not any(name.startswith("triton.") for name in sys.modules)
print("sampled")
"""
    assert python(code, tmp_path) == "sampled"


def test_checkout_works_without_installation(tmp_path):
    for folder in ("fastddpm", "kernels"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    code = "import fastddpm.kernels; print(fastddpm.__file__, fastddpm.kernels.__file__)"
    places = [str(tmp_path / name / "__init__.py") for name in ("fastddpm", "kernels")]
    assert python(code, tmp_path.parent, PYTHONPATH=str(tmp_path)).split() == places


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """What the wheel installs."""
    made = tmp_path_factory.mktemp("wheel")
    source, site = made / "source", made / "site"
    for folder in ("fastddpm", "kernels"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", made, source]
    subprocess.run(build, check=True, capture_output=True, env=os.environ | {"PIP_NO_INDEX": "1"})
    [wheel] = made.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


def test_wheel_holds_the_package_and_nothing_else(site, tmp_path):
    found = {path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()}
    want = {path.relative_to(ROOT).as_posix().replace("kernels/", "fastddpm/kernels/", 1) for path in PACKAGE}
    want |= {"fastddpm/py.typed"}
    want |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "fastddpm/models").rglob("*") if path.is_file()}
    assert {name for name in found if ".dist-info/" not in name} == want
    assert f"fastddpm-{fastddpm.__version__}.dist-info/licenses/LICENSE" in found
    code = "import fastddpm.kernels; print(fastddpm.__file__, fastddpm.kernels.__file__)"
    places = [str(site / "fastddpm/__init__.py"), str(site / "fastddpm/kernels/__init__.py")]
    assert python(code, tmp_path, PYTHONPATH=str(site)).split() == places


def test_wheel_says_what_it_is_and_where_it_comes_from(site):
    [file] = site.glob("*.dist-info/METADATA")
    about = email.message_from_string(file.read_text("utf-8"))
    urls = dict(line.split(", ") for line in about.get_all("Project-URL"))
    assert urls.keys() == {"Repository", "Documentation", "Changelog", "Issues"}
    assert all(url.startswith(urls["Repository"]) for url in urls.values())
    assert "Typing :: Typed" in about.get_all("Classifier")
    assert (
        about["License-Expression"] == "Apache-2.0 AND CC-BY-SA-4.0"
    )  # so that a classifier of the licence would be refused
    assert about["Description-Content-Type"] == "text/markdown"
    assert about.get_payload().startswith("# fastddpm\n")


def test_version_has_one_source():
    assert importlib.metadata.version("fastddpm") == fastddpm.__version__
    number = re.escape(fastddpm.__version__)
    assert re.search(rf'^__version__ = "{number}"$', (ROOT / "fastddpm/_version.py").read_text(), re.MULTILINE)
    assert not re.search(r"^version\b.*\d", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert f"## [{fastddpm.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_ci_runs_the_tests_and_the_benchmarks():
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    assert script.read_text().endswith("\nexec make test docs smoke\n")


@pytest.fixture
def make(tmp_path):
    """make in a copy of the Makefile's folder; gives the python commands it ran, in a machine of two shell scripts."""
    if not shutil.which("make"):
        pytest.skip("there is no make")
    log, tools = tmp_path / "log", tmp_path / "tools"
    tools.mkdir()
    interpreter = f"""#!/bin/sh
echo "${{0#{tmp_path}/}} $*" >> {log}
if [ "$2" = venv ]; then mkdir -p $3/bin && cp {tools}/python3 $3/bin/python && test ! -e no-pip; fi
"""
    (tools / "python3").write_text(interpreter)
    (tools / "python3").chmod(0o755)
    project = tmp_path / "project"
    project.mkdir()
    for name in ("Makefile", "pyproject.toml", "setup.py", "constraints.txt"):
        shutil.copy(ROOT / name, project)
    inherited = ("MAKE", "MFLAGS", "PYTHON", "OUT", "BENCH", "CHECK", "GPU_CHECK")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(inherited)}
    environment["PATH"] = f"{tools}:{environment['PATH']}"

    def run(*arguments):
        log.write_text("")
        subprocess.run(["make", *arguments], cwd=project, env=environment, check=True, capture_output=True)
        return log.read_text().splitlines()

    run.project = project
    return run


PIP_INSTALL = ".venv/bin/python -m pip install --constraint constraints.txt --editable"
LINT = [f"project/.venv/bin/python {tool}" for tool in (
    "-m ruff check",
    "-m ruff format --check",
    "-c from clang_format import clang_format; clang_format() --dry-run -Werror kernels/cpu/*.cpp kernels/cpu/*.h",
    "-m mypy",
)]  # fmt: skip


def test_make_test_sets_up_once_then_lints_and_tests(make):
    setup = ["tools/python3 -m venv .venv", f"{PIP_INSTALL} .[test]"]
    checks = [line.removeprefix("project/") for line in LINT] + [".venv/bin/python -m pytest -n 2"]
    assert make("test") == setup + checks
    assert make("test") == checks
    for number, name in enumerate(("pyproject.toml", "setup.py", "constraints.txt"), 1):
        later = (make.project / ".venv/test").stat().st_mtime + 10 * number
        os.utime(make.project / name, (later, later))
        assert make("test") == setup[1:] + checks
        os.utime(make.project / ".venv/test", (later, later))


def test_make_takes_other_versions(make):
    (make.project / "others.txt").touch()
    [setup, install, *_] = make("test", "CONSTRAINTS=others.txt", "VENV=others")
    assert setup == "tools/python3 -m venv others"
    assert install == "others/bin/python -m pip install --constraint others.txt --editable .[test]"


def test_the_development_environment_alone_has_upper_bounds():
    pinned = re.findall(r"^(torch|triton)==[\d.]+", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned == ["torch", "triton"]
    wanted = re.findall(r'^  "(?:torch|triton)(.*?)[;"]', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert len(wanted) == 2
    assert all(re.fullmatch(r">=[\d.]+", versions) for versions in wanted)


def test_make_sample_sets_up_once_then_samples(make):
    setup = ["tools/python3 -m venv .venv", f"{PIP_INSTALL} ."]
    work = [".venv/bin/python -m fastddpm sample --out samples.png"]
    assert make("sample") == setup + work
    assert make("sample") == work


def test_make_uses_another_python_as_it_is(make):
    assert make("gpu-test", "PYTHON=python3") == ["tools/python3 -m pytest -m cuda"]
    assert not (make.project / ".venv").exists()


def test_make_docs_treats_warnings_as_errors(make):
    setup = ["tools/python3 -m venv .venv", f"{PIP_INSTALL} .[docs]"]
    (make.project / "docs").mkdir()  # a folder of the target's name does not keep make from building
    work = [".venv/bin/python -m sphinx -W --keep-going -q -E docs build/docs"]
    assert make("docs") == setup + work
    assert make("docs") == work


def test_make_bench_takes_more_options_and_writes_where_it_is_told(make):
    pytest_ = "tools/python3 -m pytest bench --records "
    assert make("bench", "PYTHON=python3") == [pytest_ + "bench/results"]
    assert make("bench", "PYTHON=python3", "OUT=out", "BENCH=-k step") == [pytest_ + "out -k step"]


def test_make_gpu_check_installs_nothing_if_some_python_has_torch(make):
    check = "-m bench.gpu_check --out "
    assert make("gpu-check", "PYTHON=python3", "CHECK=here")[-1] == f"tools/python3 {check}here"
    assert make("gpu-check")[-1] == f"tools/python3 {check}build/gpu-check"
    assert make("gpu-check", "OUT=out", "GPU_CHECK=--only smoke")[-1] == f"tools/python3 {check}out --only smoke"
    assert not (make.project / ".venv").exists()
    make("smoke")
    assert make("gpu-check") == [f".venv/bin/python {check}build/gpu-check"]


def test_make_report_reads_a_check_only_if_told(make):
    report = ["tools/python3 -m bench.report bench/results", "tools/python3 -m bench.readme"]
    assert make("report", "PYTHON=python3") == report
    records = "tools/python3 -m bench.gpu_records found --results bench/results"
    assert make("report", "PYTHON=python3", "CHECK=found") == [records, *report]


def test_make_starts_over_after_a_failed_setup(make):
    (make.project / "no-pip").touch()
    with pytest.raises(subprocess.CalledProcessError):
        make("sample")
    (make.project / "no-pip").unlink()
    assert make("sample")[0] == "tools/python3 -m venv .venv"
