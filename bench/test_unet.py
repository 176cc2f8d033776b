"""Forward passes of the U-Net next to the matmul ceiling and other implementations: pytest bench/test_unet.py

Passes follow each other as in sampling: weights and activations are as hot as their size allows.
"""

import pytest

from bench.contenders import contender, forward
from bench.layouts import flops, traffic
from bench.machine import DEVICE, SCALE, repeated
from fastddpm.core.precision import PRECISIONS

BATCHES = {
    "cuda": {"cifar10-32": (1, 16, 64, 256), "celebahq-256": (1, 16, 64, 256)},
    "cpu": {"cifar10-32": (1, 16), "celebahq-256": (1,)},
    "tiny": {"cifar10-32": (1, 2)},
}[SCALE]
CONTENDERS = {
    "cuda": [
        "fastddpm graph bf16", "diffusers eager fp32", "diffusers eager bf16", "fastddpm eager bf16",
        "fastddpm graph fp16", "fastddpm graph tf32", "fastddpm graph fp32", "reference eager fp32",
        "fastddpm compiled+graph bf16", "fastddpm compiled bf16", "diffusers compiled bf16",
    ],
    "cpu": [
        "fastddpm eager bf16", "fastddpm eager fp32", "diffusers eager fp32", "diffusers eager bf16",
        "onnxruntime exported fp32", "openvino exported fp32", "openvino exported bf16", "reference eager fp32",
        "fastddpm compiled bf16", "fastddpm compiled fp32", "diffusers compiled bf16", "diffusers compiled+frozen fp32",
    ],
    "tiny": [
        *["fastddpm graph bf16"] * (DEVICE.type == "cuda"), "fastddpm eager bf16", "fastddpm compiled fp32",
        "diffusers eager fp32", "reference eager fp32",
    ],
}[SCALE]  # fmt: skip
LARGE = 64  # at 256 pixels only ours and eager diffusers, in bf16
COMPILED = {"cuda": 64, "cpu": 1, "tiny": 2}[SCALE]  # the batch that is worth minutes of compilation
CASES = [
    pytest.param(model, batch, name, marks=[pytest.mark.compiled] * ("compiled" in name))
    for name in CONTENDERS
    for model, batches in BATCHES.items()
    for batch in batches
    if ("compiled" not in name or (batch == COMPILED and model == "cifar10-32"))
    and (model == "cifar10-32" or batch < LARGE or name in ("fastddpm graph bf16", "diffusers eager bf16"))
]


@pytest.mark.parametrize(("model", "batch", "name"), CASES)
def test_forward(measure, model, batch, name):
    who = contender(name)
    with forward(model, batch, who) as ready:
        run, n = repeated(ready.run, captured="graph" in who.engine)
        measure(
            run,
            n,
            group=f"U-Net forward, {model}, batch {batch}",
            contender=name,
            bytes_moved=traffic(model, batch, PRECISIONS[who.precision].itemsize),
            flops=batch * flops(model),
            precision=who.ceiling,
            errors=ready.errors,
            facts={"prepare_s": ready.seconds},
        )
