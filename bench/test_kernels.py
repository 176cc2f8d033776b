"""Memory rates of the kernels on a GPU next to the measured rate of a device copy: pytest bench/test_kernels.py -s"""

from functools import partial

import pytest
import torch

from fastddpm import layout, noise, ops
from fastddpm.reference.diffusion import add_noise, update
from fastddpm.schedule import Schedule

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]
SHAPES = [(16_384, 3, 32, 32), (256, 3, 256, 256)]  # 200 MB of state: several times the second-level cache
LAUNCHES = 20  # in one replay: launching from Python takes longer than the kernels


def captured(call):
    """A function that runs call LAUNCHES times on the device and waits."""
    with torch.cuda.stream(torch.cuda.Stream()):
        call()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(LAUNCHES):
            call()

    def run():
        graph.replay()
        torch.cuda.synchronize()

    return run


@pytest.fixture(scope="module")
def copy_gbps():
    source = torch.zeros(1 << 28, dtype=torch.uint8, device="cuda")
    run = captured(partial(torch.empty_like(source).copy_, source))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(10):
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return 2 * source.nbytes * LAUNCHES / min(times) / 1e9


def measure(benchmark, call, bytes_moved, copy_gbps):
    benchmark.pedantic(captured(call), rounds=30, warmup_rounds=3)
    gbps = bytes_moved * LAUNCHES / benchmark.stats.stats.median / 1e9
    benchmark.extra_info.update(gpu=torch.cuda.get_device_name(), gbps=gbps, copy_gbps=copy_gbps)
    print(f"\n{benchmark.name}: {gbps:.0f} GB/s, {gbps / copy_gbps:.0%} of the copy's {copy_gbps:.0f}")


@pytest.mark.parametrize("dtype", ops.FLOATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_step(benchmark, copy_gbps, shape, dtype):
    table, address = Schedule().table().to("cuda"), noise.address(0, shape[0], "cuda")
    x, m = (layout.empty(shape[0], shape[1:], dtype=d, device="cuda").normal_() for d in (torch.float32, dtype))
    pos = torch.full(shape[:1], 500, dtype=torch.int32, device="cuda")
    z = noise.normal(address[:8], shape[1:], stream=noise.STEP, t=500)
    want = update(x[:8], m[:8], table.rows[500], z, clip=table.clip)
    ops.step(x, m, table, pos, address)
    assert torch.equal(x[:8], want)
    measure(benchmark, partial(ops.step, x, m, table, pos, address), 2 * x.nbytes + m.nbytes, copy_gbps)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_noising(benchmark, copy_gbps, shape, dtype):
    table, address = Schedule().noising_table().to("cuda"), noise.address(0, shape[0], "cuda")
    x_0 = layout.empty(shape[0], shape[1:], dtype=dtype, device="cuda").random_(256)
    t = torch.randint(1000, shape[:1], device="cuda")
    eps = noise.normal(address[:8], shape[1:], stream=noise.TRAIN, t=0)
    value = (x_0[:8].float() - 127.5) * (2 / 255) if dtype == torch.uint8 else x_0[:8]
    call = partial(ops.noising, x_0, t, address, table, dtype=torch.bfloat16)
    x_t = call()
    assert torch.equal(x_t[:8], add_noise(value, eps, table[t[:8]]).bfloat16())
    measure(benchmark, call, x_0.nbytes + x_t.nbytes, copy_gbps)
