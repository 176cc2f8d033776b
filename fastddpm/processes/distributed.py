"""Several processes that share a job, as torchrun starts them. Without torchrun there is one."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastddpm.core.checks import shown

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class AgreedError(ValueError):
    """An error of one rank, raised on all of them."""


@dataclass(frozen=True)
class Ranks:
    """The processes of a job.

    Attributes:
        rank: of this process, 0 <= rank < size; rank 0 writes files and shows progress.
        size: the number of processes.
        device: what this process computes on: the requested device, with an index if each process has a GPU.
    """

    rank: int = 0
    size: int = 1
    device: torch.device | str | None = None

    def share(self, count: int) -> slice:
        """The part of a sequence of `count` items that belongs to this rank.

        The parts follow each other in the order of the ranks; their sizes differ by at most 1.

        Raises: ValueError: there are fewer items than ranks.
        """
        if count < self.size:
            raise ValueError(
                f"a batch of {count} cannot be split among {self.size} processes; enlarge it or start fewer"
            )
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the ranks, with the same bits on every rank.

        Args: tensors: of one dtype, on `device`; overwritten.
        """
        if self.size > 1:
            flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
            dist.all_reduce(flat)
            for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(total.view_as(tensor))

    @contextmanager
    def agree(self) -> Iterator[None]:
        """Continue after the block when all ranks have finished it; if one fails in it, all fail and none waits.

        The block must not communicate with other ranks. With one process this is a no-op.

        Raises: AgreedError: on every rank, with the message of the first rank that failed.
        """
        failure = None
        try:
            yield
        except Exception as error:
            if self.size == 1:
                raise
            failure = error
        messages = self.gather(None if failure is None else one_line(failure))
        if any(messages):
            raise AgreedError(next(filter(None, messages))) from failure

    def agree_on(self, facts: Mapping[str, Any]) -> None:
        """Continue when all ranks have the same facts, which must be picklable.

        Raises: AgreedError: on every rank, if the facts differ; it names the first that does.
        """
        gathered = self.gather(dict(facts))
        for rank, other in enumerate(gathered):
            for name, value in gathered[0].items():
                if other.get(name) != value:
                    what = f"{name} is {value!s:.200} in process 0, {other.get(name)!s:.200} in process {rank}"
                    raise AgreedError(f"{what}; give all of them the same data, options and folder")

    def on_one_machine(self) -> bool:
        """Whether all processes run on this machine, as far as torchrun or the address of process 0 tells."""
        local = os.environ.get("LOCAL_WORLD_SIZE") == str(self.size)
        return self.size == 1 or local or os.environ.get("MASTER_ADDR") in _LOOPBACK

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in their order; they must be picklable."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def meeting(self) -> Callable[[], Any]:
        """Prepare a barrier that can be polled. All ranks call this at the same time.

        A rank may wait there for days, because others may have more to do.

        Returns: a function to call on arrival at the barrier. It returns another function to call repeatedly until it
            returns True: all ranks have arrived. That one raises RuntimeError if a rank was lost.
        """
        if self.size == 1:
            return lambda: lambda: True
        barrier_group = dist.new_group(backend="gloo", timeout=timedelta(days=365))

        def arrive() -> Callable[[], bool]:
            work = dist.barrier(barrier_group, async_op=True)

            def all_arrived() -> bool:
                if work.is_completed():
                    work.wait()
                    dist.destroy_process_group(barrier_group)
                    return True
                return False

            return all_arrived

        return arrive


@contextmanager
def ranks(device: torch.device | str | None = None) -> Iterator[Ranks]:
    """Join the processes that torchrun started (gloo; nccl between GPUs) until the block ends.

    A process group that exists already is used and left open. After an error that the ranks have not agreed on, the
    group stays open until the process exits: closing nccl would wait for the ranks that continue, and these would exit
    before the error is printed.

    Args:
        device: cpu, cuda, or None: a GPU if there is one. Each of several processes takes the GPU of its LOCAL_RANK.
    Raises: ValueError: several processes requested one GPU, there is no GPU for this process, or the other processes
        cannot be reached.
    """
    if dist.is_available() and dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size(), device)
        return
    size = _number("WORLD_SIZE") if all(name in os.environ for name in _ENVIRONMENT) else 1
    if size == 1:
        yield Ranks(device=device)
        return
    gpu = _own_gpu(device)
    if gpu is not None:
        torch.cuda.set_device(gpu)
    try:  # gloo in either case: agree() must not wait for a GPU
        backend = "gloo" if gpu is None else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, device_id=gpu, **_rendezvous_after_restart())
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"cannot join the {size} processes of torchrun: {one_line(error)}; start them all") from error
    try:
        yield Ranks(dist.get_rank(), size, device if gpu is None else gpu)
    except AgreedError:
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def _rendezvous_after_restart() -> dict[str, Any]:
    """Where processes meet after torchrun has restarted them: its store still holds the addresses of the old ones."""
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restarts == "0":
        return {}
    store, rank, size = next(dist.rendezvous("env://"))
    return {"store": dist.PrefixStore(f"restart {restarts}", store), "rank": rank, "world_size": size}


def _number(name: str) -> int:
    """A number that torchrun has put in the environment."""
    text = os.environ[name]
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise ValueError(
            f"{name} is {shown(text)} in the environment; want a whole number, as torchrun sets it, or none"
        )
    return int(text)


def _own_gpu(device: torch.device | str | None) -> torch.device | None:
    """The GPU of this process among several; None: it computes on the CPU."""
    if not torch.cuda.is_available() or not str(device or "cuda").startswith("cuda"):
        return None
    if str(device or "cuda") != "cuda":
        raise ValueError(f"device is '{device}', but each of several processes needs its own GPU; give 'cuda'")
    local = _number("LOCAL_RANK" if "LOCAL_RANK" in os.environ else "RANK")
    count = torch.cuda.device_count()
    if local >= count:
        raise ValueError(
            f"there is no GPU for process {local}: this machine has {count}; give --nproc-per-node {count}"
        )
    return torch.device("cuda", local)


def one_line(error: BaseException) -> str:
    """The message of an error in one line, with its type if that is not ValueError or OSError."""
    kind = [] if isinstance(error, ValueError | OSError) else [f"{type(error).__name__}:"]
    return " ".join([*kind, *str(error).split()]) or type(error).__name__
