"""Tests on a GPU: captured calls of a conditional network have the bits of diffusers, and the host does not wait."""

import pytest
import torch

from tests.conftest import needs_gpu

diffusers = pytest.importorskip("diffusers")

from fastddpm.diffusers import captured
from tests.support.tiny_pipelines import seeded

pytestmark = needs_gpu
HALVES = (torch.float16, torch.bfloat16)


def unet_pair(dtype=torch.float32):
    pair = []
    for _ in range(2):
        torch.manual_seed(0)
        unet = diffusers.UNet2DConditionModel(
            sample_size=16, block_out_channels=(32, 64), cross_attention_dim=32, attention_head_dim=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip
        pair.append(unet.to("cuda", dtype).eval())
    return pair


def given(dtype=torch.float32, n=2, seed=1):
    x, text = (torch.randn(n, *shape, generator=seeded(seed)) for shape in [(4, 16, 16), (7, 32)])
    return x.to("cuda", dtype), text.to("cuda", dtype)


def graphs_of(unet):
    return [graph.replay.graph for graph in captured._graphs[unet].kept]


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_replays_have_the_bits_of_diffusers(dtype):
    unet, twin = unet_pair(dtype)
    with torch.no_grad(), captured.capturing(unet):
        for seed, t in enumerate((999, torch.tensor(500), torch.tensor(3, device="cuda"), 417.5)):
            x, text = given(dtype, seed=seed)
            assert torch.equal(unet(x, t, text).sample, twin(x, t, text).sample)
    assert len(graphs_of(unet)) == 1
    assert isinstance(graphs_of(unet)[0], torch.cuda.CUDAGraph)


def test_torchs_settings_and_autocast_apply():
    unet, twin = unet_pair()
    x, text = given()
    allowed = torch.backends.cudnn.allow_tf32
    try:
        for tf32, half in ((False, False), (True, False), (False, True)):
            torch.backends.cudnn.allow_tf32 = tf32
            with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=half):
                expected = twin(x, 5, text).sample
                with captured.capturing(unet):
                    for _ in range(3):
                        assert torch.equal(unet(x, 5, text).sample, expected)
    finally:
        torch.backends.cudnn.allow_tf32 = allowed


def test_the_host_does_not_wait():
    unet, _ = unet_pair()
    x, text = given()
    timesteps = torch.arange(10, device="cuda")
    with torch.no_grad(), captured.capturing(unet):
        for t in timesteps[:3]:
            unet(x, t, text)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for t in (*timesteps, 7, torch.tensor(8)):
                unet(x, t, text)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_moved_and_replaced_weights_are_noticed():
    unet, twin = unet_pair()
    x, text = given()

    def move():
        unet.to("cpu")
        held.append(torch.empty(1 << 22, device="cuda"))  # so that the weights get other addresses
        unet.to("cuda")

    def replace():
        for net in (unet, twin):
            net.conv_in.weight = torch.nn.Parameter(0.5 * net.conv_in.weight.detach())

    held = []
    for change in (lambda: None, move, replace):
        change()
        with torch.no_grad(), captured.capturing(unet):
            for _ in range(3):
                assert torch.equal(unet(x, 5, text).sample, twin(x, 5, text).sample)
    assert len(graphs_of(unet)) == 1


def test_streams_are_ordered():
    unet, twin = unet_pair()
    x, text = given()
    outputs = []
    with torch.no_grad(), captured.capturing(unet):
        for t in range(20):
            with torch.cuda.stream(torch.cuda.Stream()):
                torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
                outputs.append(unet(x, t, text).sample)
        torch.cuda.synchronize()
        for t, output in enumerate(outputs):
            assert torch.equal(output, twin(x, t, text).sample)
