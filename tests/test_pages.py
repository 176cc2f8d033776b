"""The README and the pages in docs/: their Python runs, their shell commands exist, and their links lead somewhere."""

import json
import re
import shlex
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from fastddpm import Schedule, UNet1D, checkpoints
from fastddpm.audio import Audio
from fastddpm.checkpoints import shipped
from fastddpm.storage.images import save_pngs
from fastddpm.text import Text
from tests.support.jobs import tiny_unet
from tests.support.unet_model import UNetModel

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
CARDS = [ROOT / "bench/NOTES.md", *sorted((ROOT / "fastddpm/models").glob("*/README.md"))]
MAKEFILE, PROJECT = (ROOT / "Makefile").read_text(), (ROOT / "pyproject.toml").read_text()
REPOSITORY = re.search(r'^Repository = "(.*)"$', PROJECT, re.MULTILINE)[1]
OWN = re.compile(  # the addresses of the files of the repository
    rf"(?:{REPOSITORY}/blob|{REPOSITORY.replace('//github.com', '//raw.githubusercontent.com')})/main/(.*)"
)


def blocks(page):
    """[(language, code)] of the fenced blocks of a page."""
    return re.findall(r"^```(\S*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def by_name(pages):
    return pytest.mark.parametrize("page", pages, ids=lambda page: page.relative_to(ROOT).as_posix())


# Python

LONG = "takes hours, or much of the memory"
NEEDS = {  # {page: [(text, stand-in, why it cannot run as it stands)]}
    "gpu.md": [('device="cuda"', 'device="cpu"', "a GPU"), ('"graph"', '"eager"', "a GPU")],
    "samples.md": [("50_000", "6", LONG)],
    "recipes.md": [("[950, 750, 500, 250, 50]", "[95, 75, 50, 25, 5]", "the stand-in has a tenth of the timesteps")],
    "training.md": [("TrainOptions(steps=20_000)", "TrainOptions(steps=2, batch_size=4, channels=(8,), "
                     "attention=(), sample_every=0)", LONG)],
}  # fmt: skip
WITH_PYTHON = [page for page in PAGES if any(language == "python" for language, _ in blocks(page))]


@pytest.fixture
def readers_folder(tmp_path, monkeypatch):
    """A folder with what the pages name: checkpoints (instead of a download), data, a network that gives features.

    Bundled models are stand-ins, too: small networks and few steps, so that a page takes seconds.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    grey = tiny_unet(sample_size=28)
    colour = tiny_unet(sample_size=32, in_channels=3, out_channels=3)
    for name, net, steps in (("runs/mine", grey, 100), ("google/ddpm-cifar10-32", colour, 1000)):
        checkpoints.save(name, net.config, net.state_dict(), Schedule(num_train_timesteps=steps))
    monkeypatch.setitem(shipped.FOLDERS, "fashion-mnist", tmp_path / "runs/mine")
    small, few = {"down_dims": (8,), "n_groups": 4, "kernel_size": 1}, Schedule(num_train_timesteps=10)
    digits = UNet1D(**small, input_dim=128, sample_size=96, num_class_embeds=11)
    names = UNet1D(**small, input_dim=16, sample_size=16)
    for name, net, more in (
        ("spoken-digits", digits, {"null_label": 10, "medium": Audio(8000, "spectrogram")}),
        ("names", names, {"medium": Text.fit(["abcdefghijkl"], "embeddings")}),
    ):
        checkpoints.save(f"runs/{name}", net.config, net.state_dict(), few, **more)
        monkeypatch.setitem(shipped.FOLDERS, name, tmp_path / "runs" / name)
    rng = np.random.default_rng(0)
    np.savez("fashion-mnist.npz", x_train=rng.integers(0, 256, (16, 28, 28), np.uint8))
    np.savez("test.npz", x=rng.integers(0, 256, (3, 28, 28), np.uint8))
    np.savez("cifar10.npz", x=rng.integers(0, 256, (6, 32, 32, 3), np.uint8))
    save_pngs(rng.integers(0, 256, (6, 32, 32, 3), np.uint8), "drawn")
    policy = shutil.copytree(ROOT / "tests/data/lerobot-diffusion", tmp_path / "policy")
    config = json.loads((policy / "config.json").read_text())
    (policy / "config.json").write_text(json.dumps(config | {"num_inference_steps": None}))
    (tmp_path / "imagenet").mkdir()
    classes = UNetModel(num_classes=1000, out_channels=6)
    torch.save(classes.state_dict(), "imagenet/256x256_diffusion.pt")
    flags = {"image_size": 8, "num_heads": 1, "class_cond": True, "learn_sigma": True}
    (tmp_path / "imagenet/256x256_diffusion.json").write_text(json.dumps(flags))
    features = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten())
    torch.jit.script(features).save("inception.pt")
    return tmp_path


def save_stable_diffusion(folder):
    """Save a tiny pipeline in the place of Stable Diffusion 1.5."""
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    from tests.support.stable_diffusion import ddim, stable_diffusion

    stable_diffusion(folder, ddim()).save_pretrained(folder / "stable-diffusion-v1-5/stable-diffusion-v1-5")


@pytest.mark.slow
@by_name(WITH_PYTHON)
def test_python_of_a_page_runs_in_order(page, readers_folder):
    names: dict = {}
    if page.name == "diffusers.md":
        save_stable_diffusion(readers_folder)
    for language, code in blocks(page):
        if language != "python":
            continue
        if "diffusers import" in code and not find_spec("diffusers"):
            pytest.skip("diffusers is not installed")
        for text, stand_in, why in NEEDS.get(page.name, ()):
            if why != "a GPU" or not torch.cuda.is_available():
                code = code.replace(text, stand_in)
        exec(compile(code, f"{page.name}: {code[:20]!r}", "exec"), names)
        for name, shape in re.findall(r"^(\w+) = .*  # \[([\d, ]+)\]", code, re.MULTILINE):
            assert list(names[name].shape) == [int(n) for n in shape.split(",")], f"{page.name}: {name}"


def test_stand_ins_are_needed():
    for name, stand_ins in NEEDS.items():
        code = "".join(code for language, code in blocks(ROOT / "docs" / name) if language == "python")
        assert all(text in code for text, *_ in stand_ins)


# Other blocks


def test_every_kind_of_block_is_checked():
    elsewhere = {
        "bash": "below, and in tests/cli/test_documentation.py",
        "text": "pseudocode of the noise standard, which tests/core/test_noise.py compares with its vectors",
        "yaml": "below",
        "{eval-rst}": "built by make docs",
        "{toctree}": "built by make docs",
    }
    found = {language for page in [*PAGES, *CARDS] for language, _ in blocks(page)}
    assert found == {"python", *elsewhere}


def shell_commands(text):
    """The words of each command, without comments."""
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def missing(words):
    """What a shell command names that does not exist."""
    program = Path(words[0]).name
    if program == "make":
        targets = [word for word in words[1:] if "=" not in word]
        yield from (target for target in targets if not re.search(rf"^{target}:", MAKEFILE, re.MULTILINE))
    elif program == "python" and words[1] == "-m":
        if not find_spec(words[2]):
            yield words[2]
        yield from (word for word in words[3:] if word.startswith("tests/") and not (ROOT / word).exists())
    elif program == "pip":
        extras = [extra for word in words for extra in re.findall(r"\[(.*)\]", word)]
        yield from (extra for extra in extras if not re.search(rf"^{extra} = \[", PROJECT, re.MULTILINE))
    elif program not in ("fastddpm", "torchrun", "export", "pre-commit"):
        yield words[0]


@by_name([*PAGES, *CARDS])
def test_shell_commands_of_a_page_exist(page):
    found = [words for language, code in blocks(page) if language == "bash" for words in shell_commands(code)]
    assert [name for words in found for name in missing(words)] == []


def test_a_missing_command_is_seen():
    text = "make test no1 A=b\n\npython -m bench.judge\npython -m bench.no2 tests/no3.py # b\npip install '.[no4]'"
    found = [name for words in shell_commands(text) for name in missing(words)]
    assert found == ["no1", "bench.no2", "tests/no3.py", "no4"]


def test_yaml_of_a_page_is_valid():
    yaml = pytest.importorskip("yaml")
    [code] = [code for page in PAGES for language, code in blocks(page) if language == "yaml"]
    steps = yaml.safe_load(code)["jobs"]["compare"]["steps"]
    runs = [words for step in steps if "bench" in step.get("run", "") for words in shell_commands(step["run"])]
    assert any(words[1:3] == ["-m", "bench.compare"] for words in runs)
    modules = [words[words.index("-m") + 1] for words in runs if "-m" in words]
    assert [module for module in modules if module != "venv" and not find_spec(module)] == []


# Links


def anchors(page):
    """The anchors of a page's headings, as GitHub and Sphinx make them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page):
    """The targets of a page's links and pictures; of a reference, [text][name], that of its definition or None."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    definitions = dict(re.findall(r"^\[([^]]+)\]: (\S+)$", text, re.MULTILINE))
    yield from re.findall(r"\]\(([^)\s]+)\)", text)
    yield from (definitions.get(name) for name in re.findall(r"\]\[([^]]+)\]", text))


def broken_links(page):
    """The links and pictures of a page that lead nowhere in the repository."""
    for link in links(page):
        own = link and OWN.fullmatch(link)
        if link and re.match("https?:", link) and not own:
            continue
        file, _, anchor = (own[1] if own else link or "").partition("#")
        target = ((ROOT if own else page.parent) / file) if file else page
        if link is None or not target.exists() or (anchor and anchor not in anchors(target)):
            yield link


@by_name([*PAGES, *CARDS])
def test_links_lead_somewhere(page):
    assert list(broken_links(page)) == []


def test_a_broken_link_is_seen(tmp_path):
    (tmp_path / "there.md").write_text("# One, two\n```text\n# no heading\n```\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](there.md) [b](there.md#one-two) [c](gone.md) ![d](there.md#no-heading) [e](https://x.org) [f][g]\n[h][i]\n"
        f"[i]: {REPOSITORY}/blob/main/gone.py\n[j]: {REPOSITORY}/blob/main/README.md\n"
    )
    assert list(broken_links(page)) == ["gone.md", "there.md#no-heading", None, f"{REPOSITORY}/blob/main/gone.py"]


def test_readme_links_work_wherever_it_is_shown():
    assert [link for link in links(README) if not link.startswith(("https://", "#"))] == []
    pictures = [name for _, name in re.findall(r"!\[([^]]*)\]\[([^]]+)\]", README.read_text())]
    addresses = re.findall(r"^\[(.*)\]: https://raw\.", README.read_text(), re.MULTILINE)
    assert pictures == addresses  # other addresses of a picture show a page around it


def test_readme_is_short():
    text = re.sub(r"<!-- BEGIN .*?<!-- END ", "", README.read_text(), flags=re.DOTALL)  # a table for each machine
    assert len(text.splitlines()) <= 120
