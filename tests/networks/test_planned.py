"""A fused U-Net as a program of C++ kernels. That it is accurate is tested in test_unet2d.py, with all options."""

import copy
import pickle
from threading import Thread

import pytest
import torch

from fastddpm import Sampler, UNet2D, ops
from fastddpm.kernels.cpu.native import native
from fastddpm.kernels.cpu.program import pack as program_pack
from fastddpm.networks.planned import MOST_SHAPES, PlannedUNet, fastest_forward
from tests.networks.test_unet2d import OPTIONS, OWN
from tests.support.check import TINY, at_once
from tests.support.draws import generator

pytestmark = pytest.mark.skipif(ops.backend("cpu") != "cpp", reason="the C++ kernels have not been built")

UNPLANNED = {  # options that programs lack
    "gelu": {"act_fn": "gelu"},
    "center_input_sample": {"center_input_sample": True},
}


def tiny(**options) -> UNet2D:
    torch.manual_seed(0)
    return UNet2D(**{**TINY, **options}).eval()


def images(n: int, side: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 3, side, side, generator=generator(seed))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_precisions_that_the_kernels_multiply_are_planned():
    net, planned = tiny(), {torch.float32: True, torch.bfloat16: native().module.bfloat16(), torch.float16: False}
    for dtype, expected in planned.items():
        assert isinstance(fastest_forward(net.for_inference(dtype)), PlannedUNet) == expected
    with ops.forced_backend("torch"):
        assert not isinstance(fastest_forward(net.for_inference(torch.float32)), PlannedUNet)


@pytest.mark.parametrize("option", UNPLANNED)
def test_networks_that_cannot_be_planned_run_layer_by_layer(option):
    net = tiny(**UNPLANNED[option])
    fused = net.for_inference(torch.float32)
    assert fastest_forward(fused) == fused.denoise


@pytest.mark.parametrize("option", ["mish", "scale_shift", "resnet samplers", "guided-diffusion", "no convolution"])
def test_options_of_other_projects_are_planned(option):
    config = {**OPTIONS, **OWN}[option]
    assert isinstance(fastest_forward(tiny(**config).for_inference(torch.float32)), PlannedUNet)


def test_sampler_uses_a_program_unless_it_compiles():
    for engine, planned in (("eager", True), ("compiled", False)):
        sampler = Sampler(tiny(), device="cpu", precision="fp32", engine=engine)
        sampler.engine.prepared.refresh()
        assert isinstance(sampler.engine.prepared.plain_forward, PlannedUNet) == planned


def test_bits_depend_on_neither_batch_nor_threads_nor_rows(threads):
    net = tiny(block_out_channels=(32, 64))
    fused = net.for_inference(torch.float32)
    forward, x, rows = fastest_forward(fused), images(5), fused.time_rows(torch.tensor([7]))
    want = forward(x, rows)
    for count in (1, 2, 5):
        threads(count)
        assert torch.equal(forward(x, rows), want)
    assert torch.equal(forward(x, rows.expand(5, -1)), want)
    for n in range(5):
        assert torch.equal(forward(x[n : n + 1], rows), want[n : n + 1])


def test_options_may_be_whole_numbers():
    """A kernel takes a float's bits."""
    options = {"block_out_channels": (32, 64), "norm_eps": 1, "mid_block_scale_factor": 2}
    net, same = tiny(**options), tiny(**{name: float(x) if isinstance(x, int) else x for name, x in options.items()})
    x, t = torch.randn(2, net.config["in_channels"], 8, 8), torch.tensor([3])
    same.load_state_dict(net.state_dict())
    results = []
    for one in (net, same):
        fused = one.for_inference(torch.float32)
        results.append(fastest_forward(fused)(x, fused.time_rows(t)))
    assert torch.equal(*results)


def test_empty_batch_gives_an_empty_result():
    fused = tiny().for_inference(torch.float32)
    assert fastest_forward(fused)(images(0), fused.time_rows(torch.tensor([7]))).shape == (0, 3, 16, 16)


def test_shape_is_checked():
    fused = tiny().for_inference(torch.float32)
    with pytest.raises(ValueError, match=r"^x is \(1, 3, 15, 15\); want \[N, 3, H, W\] with H and W multiples of 2"):
        fastest_forward(fused)(images(1, 15), fused.time_rows(torch.tensor([7])))


def test_programs_are_kept_for_some_shapes():
    fused = tiny().for_inference(torch.float32)
    forward, rows = fastest_forward(fused), fused.time_rows(torch.tensor([7]))
    for n in range(1, MOST_SHAPES + 4):
        forward(images(n), rows)
        forward(images(n), rows)
    assert len(forward._programs) == MOST_SHAPES


def test_changed_weights_are_packed_anew():
    net = tiny()
    fused = net.for_inference(torch.float32)
    forward, x = fastest_forward(fused), images(2)
    before = forward(x, fused.time_rows(torch.tensor([7])))
    packed = dict(forward._packed)
    fused.refresh(net)
    assert torch.equal(forward(x, fused.time_rows(torch.tensor([7]))), before)
    assert forward._packed == packed  # unchanged weights are not packed again
    with torch.no_grad():
        net.conv_in.weight[0, 0, 0, 0] += 1
    fused.refresh(net)
    anew = net.for_inference(torch.float32)
    rows = anew.time_rows(torch.tensor([7]))
    assert torch.equal(forward(x, rows), fastest_forward(anew)(x, rows))
    assert not torch.equal(forward(x, rows), before)


def test_weights_that_change_while_a_program_is_built_are_packed_anew(monkeypatch):
    """Another thread then evaluates an input of another shape."""
    net = tiny(block_out_channels=(32, 64))
    fused, packed, threads = net.for_inference(torch.float32), [], []
    planned, row = fastest_forward(fused), fused.time_rows(torch.tensor([3]))

    def pack(*args, **options):
        packed.append(program_pack(*args, **options))
        if len(packed) == 1:  # the first weight, which changes now
            with torch.no_grad():
                net.conv_in.weight.mul_(2)
            fused.refresh(net)
            threads.append(Thread(target=planned, args=(images(1, 8), row)))
            threads[0].start()
            threads[0].join(0.5)  # it waits, or must not disturb the program that is being built
        return packed[-1]

    monkeypatch.setattr("fastddpm.networks.planned.pack", pack)
    planned(images(1), row)
    threads[0].join()
    assert torch.equal(planned(images(1), row), fastest_forward(fused)(images(1), row))


def test_threads_may_share_a_network():
    fused = tiny().for_inference(torch.float32)
    forward, rows = fastest_forward(fused), fused.time_rows(torch.tensor([7]))
    inputs = [images(n, seed=n) for n in (1, 1, 2, 3)]
    want = [forward(x, rows) for x in inputs]
    fresh = fastest_forward(fused)
    for results, y in zip(at_once(*(lambda x=x: fresh(x, rows) for x in inputs), times=9), want, strict=True):
        assert all(torch.equal(result, y) for result in results)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda sampler: pickle.loads(pickle.dumps(sampler))])
def test_sampler_with_a_program_can_be_copied(duplicate):
    sampler = Sampler(tiny(), device="cpu", precision="fp32")
    want = sampler.sample(2, steps=3, progress=False)
    assert torch.equal(duplicate(sampler).sample(2, steps=3, progress=False), want)
