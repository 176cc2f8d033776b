"""Jobs for tests: a small checkpoint, the command as a process runs it, the samples it drew, the files it wrote."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import torch

from fastddpm import Schedule, UNet2D, checkpoints
from fastddpm.cli.main import main
from fastddpm.processes.distributed import ranks
from fastddpm.sampling.sampler import Sampler
from fastddpm.storage.shards import ShardFolder

__all__ = [
    "command",
    "commands",
    "contents",
    "die_storing",
    "drawn",
    "finished",
    "note_drawn",
    "options",
    "save_tiny",
    "tiny_unet",
]

TINY = {"sample_size": 4, "block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 4}
TINY |= {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "mid_block_type": None}


def tiny_unet(seed: int = 0, **config) -> UNet2D:
    torch.manual_seed(seed)
    return UNet2D(**{**TINY, "in_channels": 1, "out_channels": 1, **config})


def save_tiny(folder: Path, seed: int = 0, null_label: int | None = None, **config) -> str:
    """Save a checkpoint of a random network, 4 x 4 grey, T = 6. Returns: its folder."""
    net = tiny_unet(seed, **config)
    checkpoints.save(folder, net.config, net.state_dict(), Schedule(num_train_timesteps=6), null_label=null_label)
    return str(folder)


def options(model: str, out: Path | str, flags: str = "") -> list[str]:
    return ["sample", model, "--out", f"{out}/", "--device", "cpu", *flags.split()]


def command(arguments: list[str], *hooks: Callable[[], None]) -> int:
    """Run `fastddpm` after the hooks, which may patch it."""
    for hook in hooks:
        hook()
    return main(arguments)


def commands(*several: list[str]) -> int:
    """Run several commands one after the other in a single group of processes."""
    with ranks("cpu"):
        return max(map(main, several))


def note_drawn(folder: Path) -> None:
    """From now on, record which samples this process draws: a line per shard in a file in folder."""
    sample = Sampler.sample

    def noting(self, samples, **options):
        with (folder / f"drawn-{os.environ.get('RANK', '0')}").open("a") as file:
            file.write(f"{json.dumps(list(samples))}\n")
        return sample(self, samples, **options)

    Sampler.sample = noting  # type: ignore[method-assign]


def die_storing(shard: int) -> None:
    """Kill this process before it stores its shard of this number, counted from 0."""
    left, write = [shard], ShardFolder.write

    def counted(self, k, samples):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, k, samples)

    ShardFolder.write = counted  # type: ignore[method-assign]


def drawn(folder: Path) -> list[list[int]]:
    """The samples that each process drew, as recorded by `note_drawn`; deletes the records."""
    indices = []
    for path in sorted(folder.glob("drawn-*")):
        indices.append([index for line in path.read_text().splitlines() for index in json.loads(line)])
        path.unlink()
    return indices


def contents(folder: Path | str) -> dict[str, bytes | None]:
    """All paths in a folder: the bytes of files, None for folders."""
    paths = Path(folder).rglob("*")
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


def finished(folder: Path | str) -> set[int]:
    """The indices of the samples in finished shards."""
    shards = ShardFolder.open(folder)
    return {index for k in range(len(shards)) if shards.is_done(k) for index in shards.indices(k)}
