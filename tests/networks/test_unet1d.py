"""The conditional 1-D U-Net and its fused copy equal the specification; fixtures by lerobot's own code anchor both.

See tests/checkpoints/test_lerobot.py for these.
"""

import pytest
import torch

from fastddpm import ops
from fastddpm.core import layout
from fastddpm.networks.fused import fastest_forward
from fastddpm.networks.fused_unet1d import for_inference
from fastddpm.networks.unet1d import UNet1D, as_frames, from_frames
from fastddpm.ops.backend import forced_backend
from tests.support import check
from tests.support.check import error_line
from tests.support.defaults import defaults
from tests.support.sequences import OPTIONS, TINY, Case, numbers


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@torch.no_grad()
def test_the_network_is_the_reference(options):
    case = Case(**options)
    want = case.plain(torch.float64)
    check.assert_as_accurate(case.net(case.x, case.t, **case.given), case.plain(torch.float32), want)
    given = {name: value.double() if value.is_floating_point() else value for name, value in case.given.items()}
    got = case.net.double()(case.x.double(), case.t, **given)
    assert (got - want).abs().max() <= 1e-12 * want.abs().max()


@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize("dtype", ops.FLOATS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_fused_copy_is_as_accurate_as_torch(options, dtype, backend):
    case = Case(**options)
    with forced_backend(backend):
        got = case.fast(dtype)
    assert got.dtype == dtype
    assert layout.is_channels_last(got)
    x = case.x.to(dtype).double()
    check.assert_as_accurate(got, case.plain(dtype), case.plain(torch.float64, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_row_for_the_whole_batch(dtype):
    case = Case(global_cond_dim=5, cond_predict_scale=True)
    case.t, case.given = case.t[:1].expand(3), {"global_cond": case.given["global_cond"][:1].expand(3, -1)}
    copy = for_inference(case.net, dtype)
    rows = copy.time_rows(case.t[:1]) + copy.condition_rows(case.given["global_cond"][:1])
    forward = fastest_forward(copy)
    assert torch.equal(forward(case.x.to(dtype), rows), forward(case.x.to(dtype), rows.expand(3, -1).contiguous()))


def test_refresh_copies_new_weights():
    case = Case(cond_predict_scale=True)
    copy, before = for_inference(case.net, torch.float32), None
    for _ in range(2):
        with torch.no_grad():
            got = fastest_forward(copy)(case.x, copy.time_rows(case.t))
        check.assert_as_accurate(got, case.plain(torch.float32), case.plain(torch.float64))
        assert before is None or not torch.equal(got, before)
        before, version = got, copy.version
        with torch.no_grad():
            case.net.down_modules[0][1].conv2.block[0].weight.add_(0.1)
        copy.refresh(case.net)
        assert copy.version == version + 1
    copy.refresh(case.net)
    assert copy.version == version + 1  # nothing has changed


def test_gradients_reach_every_parameter():
    case = Case(global_cond_dim=5, cond_predict_scale=True)
    case.net(case.x, case.t, **case.given).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in case.net.parameters())


@pytest.mark.parametrize("frame", [1, 2, 8])
def test_frames_are_neighbours_and_views(frame):
    x = layout.channels_last(numbers(2, 3, 16))
    frames = as_frames(x, frame)
    assert frames.shape == (2, 3 * frame, 16 // frame)
    assert frames.data_ptr() == x.data_ptr()
    assert torch.equal(frames[1, :, 1].view(frame, 3), x[1, :, frame : 2 * frame].T)
    assert torch.equal(from_frames(frames, frame), x)


def test_the_callers_defaults_do_not_matter():
    with defaults(torch.float64):
        assert all(parameter.dtype == torch.float32 for parameter in UNet1D(**TINY).parameters())


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_dim": None}, "input_dim is None"),
        ({"down_dims": ()}, "down_dims is ()"),
        ({"down_dims": (8, 18)}, "n_groups is 4; want a divisor of each of down_dims (8, 18)"),
        ({"kernel_size": 4}, "kernel_size is 4"),
        ({"diffusion_step_embed_dim": 9}, "diffusion_step_embed_dim is 9"),
        ({"frame": 0}, "frame is 0"),
        ({"local_cond_dim": 3}, "unknown option 'local_cond_dim'"),
        ({"down_dims": (1 << 15,) * 4}, "parameters or more"),
    ],
)
def test_errors_name_the_option(options, message):
    assert message in error_line(UNet1D, **{**TINY, **options})


@pytest.mark.parametrize(
    ("options", "shape", "given", "message"),
    [
        ({}, (2, 3, 15), {}, "want [N, 3, L] with L a multiple of 2"),
        ({}, (2, 4, 16), {}, "want [N, 3, L]"),
        ({"frame": 4}, (2, 3, 12), {}, "multiple of 8"),
        ({}, (2, 3, 16), {"global_cond": torch.ones(2, 5)}, "this network is unconditional"),
        ({}, (2, 3, 16), {"class_labels": torch.zeros(2).long()}, "not class-conditional"),
        ({"global_cond_dim": 5}, (2, 3, 16), {}, "pass global_cond [N, 5]"),
        ({"global_cond_dim": 5}, (2, 3, 16), {"global_cond": torch.ones(2, 4)}, "want [N, 5]"),
        (
            {"global_cond_dim": 5},
            (2, 3, 16),
            {"global_cond": torch.ones(3, 5)},
            "global_cond has 3 entries, but x has a batch of 2; want 1 or 2",
        ),
        ({"num_class_embeds": 4}, (2, 3, 16), {}, "pass class_labels, one per sample"),
    ],
)
def test_errors_of_a_call(options, shape, given, message):
    net = UNet1D(**{**TINY, **options})
    assert message in error_line(net, torch.zeros(shape), 3, **given)
