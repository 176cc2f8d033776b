"""Jobs for tests: a small checkpoint, the command as a process runs it, what it drew, and what is in its folder."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch

from fastddpm import Schedule, UNet2D, checkpoints
from fastddpm.cli.main import main
from fastddpm.processes.distributed import ranks
from fastddpm.sampling.sampler import Sampler
from fastddpm.storage.shards import Store

__all__ = ["command", "commands", "contents", "drawn", "finished", "note_drawn", "options", "save_tiny", "tiny_unet"]

TINY = {"sample_size": 4, "block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 4}
TINY |= {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "mid_block_type": None}


def tiny_unet(seed: int = 0, **config) -> UNet2D:
    torch.manual_seed(seed)
    return UNet2D(**{**TINY, "in_channels": 1, "out_channels": 1, **config})


def save_tiny(folder: Path, seed: int = 0, **config) -> str:
    """A checkpoint of a random network, 4 x 4 grey, T = 6."""
    net = tiny_unet(seed, **config)
    checkpoints.save(folder, net.config, net.state_dict(), Schedule(num_train_timesteps=6))
    return str(folder)


def options(model: str, out: Path | str, flags: str = "") -> list[str]:
    return ["sample", model, "--out", f"{out}/", "--device", "cpu", *flags.split()]


def command(arguments: list[str], *hooks: Callable[[], None]) -> int:
    """`fastddpm`, after looks at, or attempts on, what it will do."""
    for hook in hooks:
        hook()
    return main(arguments)


def commands(*several: list[str]) -> int:
    """One after the other, by processes that meet once."""
    with ranks("cpu"):
        return max(map(main, several))


def note_drawn(folder: Path) -> None:
    """Keep which samples this process draws, a shard a line."""
    sample = Sampler.sample

    def noted(self, samples, **how):
        with (folder / f"drawn-{os.environ.get('RANK', '0')}").open("a") as file:
            file.write(f"{json.dumps(list(samples))}\n")
        return sample(self, samples, **how)

    Sampler.sample = noted  # type: ignore[method-assign]


def drawn(folder: Path) -> list[list[int]]:
    """What each process drew, as it kept it; forgotten with that."""
    found = []
    for path in sorted(folder.glob("drawn-*")):
        found.append([index for line in path.read_text().splitlines() for index in json.loads(line)])
        path.unlink()
    return found


def contents(folder: Path | str) -> dict[str, bytes | None]:
    """All that is in a folder: the bytes of files, None for folders."""
    paths = Path(folder).rglob("*")
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


def finished(folder: Path | str) -> set[int]:
    """The samples of the shards that are done."""
    store = Store.open(folder)
    return {index for k in range(len(store)) if store.is_done(k) for index in store.indices(k)}
