"""Two builds of the package, measured here in turns by the benchmarks of this checkout."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from tqdm import tqdm

from bench.turns import Side, alternate

HERE = Path(__file__).parent
ROOT = HERE.parent
PYTEST = "import pytest, sys; from bench import turns; sys.exit(pytest.main(sys.argv[1:], plugins=[turns]))"
ENDED = (0, 1, 5)  # pytest's status: all passed, some failed, none was chosen
TAIL = 20  # lines of output that tell why a side died
LEFT_OUT = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "results")


def kind(name: str, repository: Path = ROOT) -> str:
    """What is to be compared: "records", or a build: "installed", "checkout" or "revision".

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
        f"{name} is neither records (a file or folder of *.jsonl) nor a build of the package: a folder it is installed "
        f"in, a source checkout, or a git revision of {repository}"
    )


def install(name: str, folder: Path, repository: Path = ROOT) -> tuple[Path, str]:
    """(tree, commit) of a build: the folder to import it from, `folder` if it is installed now; and what it is called.

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
            shutil.copytree(path, source, ignore=LEFT_OUT)  # setuptools would leave its files there, or use old ones
        how = ["--quiet", "--target", str(folder), "--no-deps", "--no-build-isolation"]
        _run([sys.executable, "-m", "pip", "install", *how, str(source)], f"installing {name}")
    return folder, commit


def measure(
    base: str, head: str, out: Path, *, launches: int = 1, options: Sequence[str] = (), suite: Path | None = None
) -> list[str]:
    """Measure two builds; records go to out/base and out/head, what pytest prints to out/base.log and out/head.log.

    Args: launches: pairs of processes, each starting anew, the other one first; options: more for pytest; suite: the
        folder of other benchmarks.
    Returns: of each process that died, how, and the end of its output.
    Raises: ValueError: a build cannot be installed or imported.
    """
    with TemporaryDirectory() as temporary:
        work = Path(temporary).resolve()
        here = work / "here"  # a copy, beside which there is no fastddpm
        shutil.copytree(HERE, here / "bench", ignore=LEFT_OUT)
        run = [sys.executable, "-c", PYTEST, str(suite or here / "bench"), "-p", "no:cacheprovider"]
        run += ["--continue-on-collection-errors", "--benchmark-min-rounds=10", *options]
        environments = {}
        for side, name in tqdm({"base": base, "head": head}.items(), desc="installing", leave=False):
            (out / side).mkdir(parents=True)
            environments[side] = _environment(*install(name, work / side), here)
        for launch in range(launches):
            sides = {
                side: Side([*run, f"--records={out / side}"], cwd=here, env=environment, log=out / f"{side}.log")
                for side, environment in environments.items()
            }
            order = list(sides.values())
            alternate(order if launch % 2 == 0 else order[::-1], f"launch {launch + 1} of {launches}")
            if problems := [_obituary(name, side) for name, side in sides.items() if side.status not in ENDED]:
                return problems
    return []


def _environment(tree: Path, commit: str, here: Path) -> dict[str, str]:
    """The environment in which fastddpm is the tree's, and bench that in the folder `here`."""
    path = [str(tree), str(here), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path), "COMMIT": commit}
    code = "import fastddpm, fastddpm.kernels; print(fastddpm.__file__, fastddpm.kernels.__file__, sep='\\n')"
    found = _run([sys.executable, "-c", code], f"importing fastddpm of {tree}", cwd=here, env=environment)
    for file in found.splitlines():
        if not Path(file).resolve().is_relative_to(tree):
            raise ValueError(f"python imports {file}, not what is in {tree}; is that a whole installation?")
    return environment


def _obituary(name: str, side: Side) -> str:
    lines = side.log.read_text(errors="replace").splitlines()[-TAIL:]
    how = f"with status {side.status}" if side.status >= 0 else f"by signal {-side.status}"
    where = f" in or after {side.case}" if side.case else " before its first case"
    return "\n".join([f"{name} died {how}{where}; the end of its output:", *lines])


def _commit(checkout: Path) -> str:
    """Its revision, with -dirty if it is not quite that; its name where it has none."""
    revision = _git(checkout, "rev-parse", "HEAD") if (checkout / ".git").exists() else ""
    if not revision:
        return checkout.name
    return revision + ("-dirty" if _git(checkout, "status", "--porcelain", "--", ".", ":!bench/results") else "")


def _git(repository: Path, *command: str) -> str:
    """What it prints; nothing if it fails."""
    run = ["git", "-C", str(repository), *command]
    try:
        return subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _run(command: Sequence[str], what: str, **how: object) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, **how)
    if done.returncode:
        reason = (done.stderr.strip() or done.stdout.strip() or f"status {done.returncode}").splitlines()[-1]
        raise ValueError(f"{what} failed: {reason}")
    return done.stdout
