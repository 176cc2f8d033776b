"""Several processes at one job, as torchrun starts them; without it, this one alone."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class AgreedError(ValueError):
    """What failed on one rank, raised on all of them."""


@dataclass(frozen=True)
class Ranks:
    """The processes at this job.

    Attributes:
        rank: of this process, 0 <= rank < size; 0 is the one that writes files and shows progress.
        size: how many there are.
        device: what this process computes on: what was asked for, with this rank's number where that is a GPU.
    """

    rank: int = 0
    size: int = 1
    device: torch.device | str | None = None

    def share(self, count: int) -> slice:
        """This rank's part of `count` things in a row: the ranks' parts follow each other, sizes differ by at most 1.

        Raises: ValueError: there are fewer things than ranks.
        """
        if count < self.size:
            raise ValueError(f"a batch of {count} does not go round {self.size} processes; enlarge it, or start fewer")
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Make each tensor, in place, its sum over the ranks: the same bits on each. All of one dtype, on `device`."""
        if self.size > 1:
            together = torch.cat([tensor.reshape(-1) for tensor in tensors])
            dist.all_reduce(together)
            for tensor, total in zip(tensors, together.split([tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(total.view_as(tensor))

    @contextmanager
    def agree(self) -> Iterator[None]:
        """Go on after the block when all ranks have come through it; if one fails in it, all fail and none waits.

        The block may not talk to other ranks. Alone, it is as if it stood without.

        Raises: AgreedError: on every rank, the error of the first rank that failed.
        """
        failed = None
        try:
            yield
        except Exception as error:
            if self.size == 1:
                raise
            failed = error
        told = self.gather(None if failed is None else one_line(failed))
        if any(told):
            raise AgreedError(next(filter(None, told))) from failed

    def agree_on(self, facts: Mapping[str, Any]) -> None:
        """Go on when all ranks know the same facts, of types that pickle knows.

        Raises: AgreedError: on every rank, if one knows another; it names the first that differs.
        """
        everybodys = self.gather(dict(facts))
        for rank, other in enumerate(everybodys):
            for name, value in everybodys[0].items():
                if other.get(name) != value:
                    what = f"{name} is {value!s:.200} in process 0, {other.get(name)!s:.200} in process {rank}"
                    raise AgreedError(f"{what}; give all of them the same data, options and folder")

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, of types that pickle knows."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def meeting(self) -> Callable[[], Any]:
        """Arrange, all ranks at once, for a place to wait for each other: for days, if one has more to do than another.

        Returns: what a rank calls when it is there. It then calls what this returns until that is True: all are there.
            That raises RuntimeError if a rank was lost.
        """
        if self.size == 1:
            return lambda: lambda: True
        place = dist.new_group(backend="gloo", timeout=timedelta(days=365))

        def arrive() -> Callable[[], bool]:
            work = dist.barrier(place, async_op=True)

            def all_there() -> bool:
                if work.is_completed():
                    work.wait()
                    dist.destroy_process_group(place)
                    return True
                return False

            return all_there

        return arrive


@contextmanager
def ranks(device: torch.device | str | None = None) -> Iterator[Ranks]:
    """Join the processes that torchrun started (gloo; nccl between GPUs) until the block ends.

    A process group that is there already is used as it is, and left. After an error that is not agreed upon the group
    stays until the process ends: nccl would wait for ranks that go on, and they shall not end before it is told.

    Args:
        device: cpu, cuda, or None: a GPU where there is one. Of several processes each takes the GPU of its LOCAL_RANK.
    Raises: ValueError: one GPU was asked for all, there is none for this process, or the others cannot be reached.
    """
    if dist.is_available() and dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size(), device)
        return
    size = int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in _ENVIRONMENT) else 1
    if size == 1:
        yield Ranks(device=device)
        return
    gpu = _gpu(device)
    if gpu is not None:
        torch.cuda.set_device(gpu)
    try:  # gloo in either case: agree() must not wait for a GPU
        dist.init_process_group("gloo" if gpu is None else "cpu:gloo,cuda:nccl", device_id=gpu, **_again())
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"cannot join the {size} processes of torchrun: {one_line(error)}; start them all") from error
    try:
        yield Ranks(dist.get_rank(), size, device if gpu is None else gpu)
    except AgreedError:
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def _again() -> dict[str, Any]:
    """Where processes meet that torchrun has started again: its store keeps the addresses of those before them."""
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restarts == "0":
        return {}
    store, rank, size = next(dist.rendezvous("env://"))
    return {"store": dist.PrefixStore(f"restart {restarts}", store), "rank": rank, "world_size": size}


def _gpu(device: torch.device | str | None) -> torch.device | None:
    """The GPU of this process among several, None for a CPU."""
    if not torch.cuda.is_available() or not str(device or "cuda").startswith("cuda"):
        return None
    if str(device or "cuda") != "cuda":
        raise ValueError(f"device is '{device}'; of several processes each takes a GPU of its own: give 'cuda'")
    local, count = int(os.environ.get("LOCAL_RANK", os.environ["RANK"])), torch.cuda.device_count()
    if local >= count:
        raise ValueError(f"process {local} finds no GPU: this machine has {count}; give --nproc-per-node {count}")
    return torch.device("cuda", local)


def one_line(error: BaseException) -> str:
    """What failed, in one line, as the command line says it."""
    kind = [] if isinstance(error, ValueError | OSError) else [f"{type(error).__name__}:"]
    return " ".join([*kind, *str(error).split()]) or type(error).__name__
