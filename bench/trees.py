"""Installs two builds of the package, and measures them in turns with the benchmarks of this checkout."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tqdm import tqdm

from bench.turns import Side, alternate

HERE = Path(__file__).parent
ROOT = HERE.parent
# otherwise an editable installation of this checkout would supply the modules that a build lacks
ONLY_THE_BUILD = (
    "import sys; sys.meta_path[:] = [finder for finder in sys.meta_path if '_Editable' not in str(finder)]; "
)
PYTEST = f"{ONLY_THE_BUILD}import pytest; from bench import turns; sys.exit(pytest.main(sys.argv[1:], plugins=[turns]))"
ENDED = (0, 1, 5)  # pytest's exit statuses: all passed, some failed, none was selected
TAIL = 20  # lines of output that are shown of a process that died
LEFT_OUT = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "results")


def kind(name: str, repository: Path = ROOT) -> str:
    """Return what a name refers to: "records", or a build: "installed", "checkout" or "revision".

    Raises: ValueError: none of them.
    """
    path = Path(name)
    if (path / "fastddpm" / "__init__.py").is_file() and (path / "fastddpm" / "kernels").is_dir():
        return "installed"
    if (path / "pyproject.toml").is_file() and (path / "kernels").is_dir():
        return "checkout"
    if path.is_file() or (path.is_dir() and any(path.rglob("*.jsonl"))):
        return "records"
    if _git(repository, "rev-parse", "--quiet", "--verify", f"{name}^{{commit}}"):
        return "revision"
    raise ValueError(
        f"{name} is neither records nor a build of the package; want a file or folder of *.jsonl, a folder that the "
        f"package is installed in, a source checkout, or a git revision of {repository}"
    )


def install(name: str, folder: Path, repository: Path = ROOT) -> tuple[Path, str]:
    """Install a build in a folder, unless it is installed already.

    Returns: (the folder to import it from, the name of the build).
    Raises: ValueError: it cannot be installed.
    """
    found, path = kind(name, repository), Path(name).resolve()
    if found == "installed":
        return path, path.name
    with TemporaryDirectory() as copied:
        source = Path(copied) / "source"
        if found == "revision":
            commit = _git(repository, "rev-parse", f"{name}^{{commit}}")
            archive = f"{source}.zip"
            _run(["git", "-C", str(repository), "archive", f"--output={archive}", commit], f"git archive of {name}")
            shutil.unpack_archive(archive, source)
        else:
            commit = _commit(path)
            # a copy: setuptools would write to the checkout, or use its stale files
            shutil.copytree(path, source, ignore=LEFT_OUT)
        options = ["--quiet", "--target", str(folder), "--no-deps", "--no-build-isolation"]
        _run([sys.executable, "-m", "pip", "install", *options, str(source)], f"installing {name}")
    return folder, commit


def measure(
    base: str, head: str, out: Path, *, launches: int = 1, options: Sequence[str] = (), suite: Path | None = None
) -> list[str]:
    """Measure two builds. Records go to out/base and out/head, the output of pytest to out/base.log and out/head.log.

    Args:
        launches: pairs of new processes; the side that starts first alternates.
        options: more options for pytest.
        suite: the folder of other benchmarks.
    Returns: for each process that died, how it died and the end of its output.
    Raises: ValueError: a build cannot be installed, or these benchmarks cannot import it.
    """
    with TemporaryDirectory() as temporary:
        work = Path(temporary).resolve()
        here = work / "here"  # a copy, which has no fastddpm next to it
        shutil.copytree(HERE, here / "bench", ignore=LEFT_OUT)
        run = [sys.executable, "-c", PYTEST, str(suite or here / "bench"), "-p", "no:cacheprovider"]
        run += ["--continue-on-collection-errors", "--benchmark-min-rounds=10", *options]
        environments = {}
        for side, name in tqdm({"base": base, "head": head}.items(), desc="installing", leave=False):
            (out / side).mkdir(parents=True)
            environments[side] = environment = _environment(*install(name, work / side), here)
            if suite is None:
                _check_benchmarks(name, here, environment)
        for launch in range(launches):
            sides = {
                side: Side([*run, f"--records={out / side}"], cwd=here, env=environment, log=out / f"{side}.log")
                for side, environment in environments.items()
            }
            order = list(sides.values())
            alternate(order if launch % 2 == 0 else order[::-1], f"launch {launch + 1} of {launches}")
            if problems := [_failure_report(name, side) for name, side in sides.items() if side.status not in ENDED]:
                return problems
    return []


def _environment(tree: Path, commit: str, here: Path) -> dict[str, str]:
    """Return the environment in which fastddpm is the tree's, and bench the one in the folder `here`."""
    path = [str(tree), str(here), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path), "COMMIT": commit}
    code = "import fastddpm, fastddpm.kernels; print(fastddpm.__file__, fastddpm.kernels.__file__, sep='\\n')"
    found = _run([sys.executable, "-c", code], f"importing fastddpm of {tree}", cwd=here, env=environment)
    for file in found.splitlines():
        if not Path(file).resolve().is_relative_to(tree):
            raise ValueError(f"python imports {file}, not what is in {tree}; is that installation complete?")
    return environment


def _check_benchmarks(name: str, here: Path, environment: dict[str, str]) -> None:
    """Raises: ValueError: the benchmarks in the folder `here` cannot import the build of this environment."""
    run = [sys.executable, "-c", f"{ONLY_THE_BUILD}import bench.contenders"]
    try:
        _run(run, "importing it", cwd=here, env=environment)
    except ValueError as error:
        raise ValueError(
            f"the benchmarks of this checkout cannot measure {name}: {error}; want a build with the modules that they "
            "import. To compare an older one, run make bench in a checkout of each revision, and compare the records"
        ) from None


def _failure_report(name: str, side: Side) -> str:
    lines = side.log.read_text(errors="replace").splitlines()[-TAIL:]
    cause = f"with status {side.status}" if side.status >= 0 else f"by signal {-side.status}"
    where = f" in or after {side.case}" if side.case else " before its first case"
    return "\n".join([f"{name} died {cause}{where}; the end of its output:", *lines])


def _commit(checkout: Path) -> str:
    """Return its revision, with -dirty if it has changes; without a repository, the name of the folder."""
    revision = _git(checkout, "rev-parse", "HEAD") if (checkout / ".git").exists() else ""
    if not revision:
        return checkout.name
    return revision + ("-dirty" if _git(checkout, "status", "--porcelain", "--", ".", ":!bench/results") else "")


def _git(repository: Path, *command: str) -> str:
    """Return the output of a git command; an empty string if it fails."""
    run = ["git", "-C", str(repository), *command]
    try:
        return subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _run(command: Sequence[str], what: str, **options: Any) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    if done.returncode:
        reason = (done.stderr.strip() or done.stdout.strip() or f"status {done.returncode}").splitlines()[-1]
        raise ValueError(f"{what} failed: {reason}")
    return done.stdout
