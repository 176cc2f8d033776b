"""Runs the same work on the same buffers again and again: directly, compiled, or as the replay of a CUDA graph."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from fastddpm import ops
from fastddpm.sampling.capture import CaptureError, NoWaiting, capture
from fastddpm.sampling.fixed_reads import FixedReads
from fastddpm.sampling.model import PreparedModel

Network = Callable[..., Any]


class Replay:
    """Runs the same work on the same buffers again and again: directly, or as the replay of a captured CUDA graph.

    The work is a function of the network to call. It is passed to each method, not stored: it is a method of the
    object that owns this one, and a reference cycle would delay the release of their memory.
    """

    def __init__(self, prepared: PreparedModel, n: int, *, capture: bool):
        self.prepared, self.n = prepared, n
        self.capture = capture
        self.graph: torch.cuda.CUDAGraph | None = None
        self._prepared_for: object = None
        self._reads: FixedReads | None = None  # of a graph of a network that is not a fused `UNet2D`

    def __call__(self, run: Callable[[Network | None], None]) -> None:
        if self.graph is None:
            run(None)
        else:
            self.graph.replay()

    def prepare(self, run: Callable[[Network | None], None], reset: Callable[[], None], constants: object) -> None:
        """Compile and capture the work, unless this was already done with the same constants.

        Args:
            reset: fills the buffers with valid inputs; called before and after, as the work overwrites them.
            constants: what a captured graph fixes; if they change, the work is captured again.
        """
        prepared = self.prepared

        def run_once(network: Network | None) -> None:
            reset()
            run(network)

        if not (self.capture or prepared.compiles):
            return
        if self._prepared_for == constants and (self._reads is None or self._reads.are_current(run_once)):
            return
        self._prepared_for = self.graph = self._reads = None
        if self.capture:
            with NoWaiting(), ops.compiling(prepared.device):
                run_once(prepared.plain_forward)
            if prepared.net is None:
                self._reads = FixedReads(prepared.plain_forward, run_once, prepared.device)
        with _many_versions() if prepared.compiles else nullcontext():
            run_once(None)
        if self.capture:
            self.graph = self._captured(run)
        self._prepared_for = constants
        reset()

    def _captured(self, run: Callable[[Network | None], None]) -> torch.cuda.CUDAGraph | None:
        """Capture the work. Returns: the graph, or None if kind is "auto" and two attempts have failed."""
        prepared = self.prepared
        for _ in range(2):
            try:
                # a capture frees cuBLAS's workspaces; `arithmetic` excludes products of other networks meanwhile
                with prepared.compute.arithmetic():
                    return capture(lambda: run(None), prepared.device)
            except CaptureError as error:
                if prepared.kind != "auto":
                    raise
                failure = str(error)  # not the error: its traceback would keep tensors alive
        way_out = "engine.clear() allows another attempt"
        warnings.warn(f"{failure}. Batches of {self.n} now run eagerly, with the same bits; {way_out}", stacklevel=2)
        return None


@contextmanager
def plain_modes(device: torch.device) -> Iterator[None]:
    """A context on this device without gradients, inference mode and autocast, which the caller may have enabled."""
    there = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    # buffers created in inference mode could not be used outside it
    with there, torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def torch_settings() -> tuple[Any, ...]:
    """torch's settings that choose kernels, so that a captured graph fixes them."""
    cudnn, cuda = torch.backends.cudnn, torch.backends.cuda
    return (
        (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, torch.are_deterministic_algorithms_enabled()),
        (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()),
        cuda.cudnn_sdp_enabled(),
    )


def _many_versions() -> Any:
    """Lift torch.compile's limit of eight versions of a function: each batch size and each network needs its own."""
    import torch._dynamo

    return torch._dynamo.config.patch(recompile_limit=1 << 16, accumulated_recompile_limit=1 << 16)
