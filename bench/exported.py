"""diffusers' network in other runtimes, with a DDPM loop in numpy around it: ONNX Runtime and OpenVINO.

A user of these exports the module once, and samples without torch. The network is exported for one batch size, which
lets both runtimes plan their memory.
"""

import math
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fastddpm.reference.diffusion import Diffusion, linear_betas

Array = np.ndarray[Any, Any]
Predict = Callable[[Array, int], Array]  # (x_t, t) -> eps

PACKAGES = {"onnxruntime": ("onnx", "onnxruntime"), "openvino": ("onnx", "openvino")}


def missing_package(who: str) -> str | None:
    """The first package that a runtime needs and that is not installed."""
    return next((name for name in PACKAGES[who] if not find_spec(name)), None)


def predictor(who: str, unet: nn.Module, shape: tuple[int, ...], precision: str) -> Predict:
    """A network in a runtime, on as many threads as torch has.

    Args: shape: of a batch; precision: fp32, or bf16 for OpenVINO.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "unet.onnx")
        export(unet, shape, file)
        return {"onnxruntime": _onnxruntime, "openvino": _openvino}[who](file, precision)


def export(unet: nn.Module, shape: tuple[int, ...], file: Path) -> None:
    """Write diffusers' network as ONNX."""

    class Output(nn.Module):
        def __init__(self):
            super().__init__()
            self.unet = unet

        def forward(self, x, t):
            return self.unet(x, t, return_dict=False)[0]

    inputs = torch.zeros(shape), torch.tensor(0)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing warns of checks of shapes, and of being deprecated
        torch.onnx.export(Output(), inputs, str(file), input_names=["x", "t"], output_names=["eps"], dynamo=False)


def _onnxruntime(file: Path, precision: str) -> Predict:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file.read_bytes(), options, providers=["CPUExecutionProvider"])
    return lambda x, t: session.run(None, {"x": x, "t": np.array(t, np.int64)})[0]


def _openvino(file: Path, precision: str) -> Predict:
    import openvino

    hints = {
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[precision],
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    model = openvino.Core().compile_model(openvino.Core().read_model(file.read_bytes()), "CPU", hints)
    return lambda x, t: model([x, np.array(t, np.int64)])[0]


@cache
def coefficients(T: int) -> tuple[list[float], ...]:
    """Of each step: sqrt(abar_t), sqrt(1 - abar_t), the posterior mean's of x_0 and of x_t (eq. 7), sigma_t."""
    diffusion = Diffusion(linear_betas(T))
    abar, before, betas = diffusion.alphas_cumprod, diffusion.alphas_cumprod_prev, diffusion.betas
    of_x_0, of_x_t = before.sqrt() * betas / (1 - abar), diffusion.alphas.sqrt() * (1 - before) / (1 - abar)
    return tuple(column.tolist() for column in (abar.sqrt(), (1 - abar).sqrt(), of_x_0, of_x_t, diffusion.sigmas()))


def sample(predict: Predict, shape: tuple[int, ...], steps: int, T: int) -> Array:
    """The last steps of Algorithm 2 with x_0 clipped to [-1, 1], in numpy's float32."""
    random, columns = np.random.default_rng(0), coefficients(T)
    x = random.standard_normal(shape, dtype=np.float32)
    for t in reversed(range(steps)):
        signal, noise, of_x_0, of_x_t, sigma = (np.float32(column[t]) for column in columns)
        x_0 = np.clip((x - noise * predict(x, t)) / signal, -1, 1)
        x = of_x_0 * x_0 + of_x_t * x
        if t:
            x += sigma * random.standard_normal(shape, dtype=np.float32)
    assert math.isfinite(float(x.sum()))
    return x
