"""What only a GPU can show of the sampler and the U-Net; the kernels have their own tests."""

import math

import check
import pytest
import torch
from conftest import needs_gpu

from fastddpm import Sampler, UNet2D, noise
from fastddpm.reference.unet import UNet

pytestmark = needs_gpu
CONFIG = {**check.TINY, "block_out_channels": (32, 64), "norm_num_groups": 8}


@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 5, 7), (2, 9), (5,)])
@pytest.mark.parametrize("how", [{}, {"sampler": "ddim", "eta": 0.5}], ids=str)
def test_cpu_and_gpu_sample_the_same_bits(shape, how):
    """With a network that rounds the same on both, all the rest does, too."""
    model = lambda x, t: x * 0.75
    cpu, gpu = (
        Sampler(model, shape=shape, device=device).sample(5, seed=2, steps=20, progress=False, **how)
        for device in ("cpu", "cuda")
    )
    assert torch.equal(cpu, gpu)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_the_unet_is_as_accurate_as_plain_torch(dtype):
    torch.manual_seed(0)
    net, plain, ref = UNet2D(**CONFIG).eval(), UNet(**CONFIG).eval(), UNet(**CONFIG).eval().double().cuda()
    plain.load_state_dict(net.state_dict())
    ref.load_state_dict(net.state_dict())
    x, t = torch.randn(4, 3, 16, 16, device="cuda"), torch.tensor([300], device="cuda")
    fast = net.for_inference(dtype, "cuda")
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        ours = fast.denoise(x.to(dtype), fast.time_rows(t).to(dtype))
        theirs = plain.to("cuda", dtype)(x.to(dtype), t.expand(4))
    check.assert_as_accurate(ours, theirs, ref(x.to(dtype).double(), t.expand(4)))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_leaves_the_model_where_it_was(precision):
    torch.manual_seed(0)
    net = UNet2D(**CONFIG)
    x = Sampler(net, device="cuda", precision=precision).sample(2, steps=5, progress=False)
    assert x.device.type == "cpu"
    assert x.isfinite().all()
    assert {parameter.device.type for parameter in net.parameters()} == {"cpu"}


def test_the_first_bad_step_is_named():
    """Though the flag is read only now and then."""

    def model(x, t):
        return torch.where(
            (t[:, None] < 500) & (torch.arange(len(x), device=x.device)[:, None] == 1), math.nan, x * 0.5
        )

    with pytest.raises(ValueError, match=r"^step 501 of 1000 \(t = 499\): .* for samples \[8\]"):
        Sampler(model, shape=(3,), device="cuda").sample([7, 8, 9], progress=False)


def test_the_noise_is_the_same_bits():
    address = noise.address(2**64 - 1, [0, 5, 2**40])
    for shape in ((3, 5, 7), (4, 9), (5,)):
        cpu = noise.normal(address, shape, stream=noise.START, t=1000)
        assert torch.equal(cpu, noise.normal(address.cuda(), shape, stream=noise.START, t=1000).cpu())
