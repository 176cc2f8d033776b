"""A `Sampler` is pickled and copied as its model, its schedule and its settings; buffers and graphs are made anew."""

import copy
import io
import multiprocessing
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fastddpm import Sampler, Schedule, UNet2D
from fastddpm.core import precision
from fastddpm.core.precision import Compute
from fastddpm.networks.unet2d import network_obstacles
from fastddpm.sampling.engine import Engine
from tests.support.check import TINY

SMALL = {**TINY, "sample_size": 8, "in_channels": 1, "out_channels": 1}
SCHEDULE = Schedule(num_train_timesteps=20, beta_schedule="squaredcos_cap_v2")
SETTINGS = {"steps": 2, "progress": False, "seed": 3}


def by_torch(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda thing: pickle.loads(pickle.dumps(thing)),
    "old pickle": lambda thing: pickle.loads(pickle.dumps(thing, 2)),
    "torch.save": by_torch,
}


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 3)

    def forward(self, x, t):
        return self.linear(x)


class Agent(nn.Module):
    """A module that holds a network and a sampler of it."""

    def __init__(self):
        super().__init__()
        self.net = unet()
        self.sampler = Sampler(self.net, SCHEDULE, device="cpu")


class OfItself(Network):
    """A network that holds a sampler of itself."""

    def __init__(self):
        super().__init__()
        self.sampler = Sampler(self, SCHEDULE, shape=(3,), device="cpu")


class UNetOfItself(UNet2D):
    def __init__(self, **config):
        super().__init__(**config)
        self.sampler = Sampler(self, SCHEDULE, device="cpu")


def unet():
    torch.manual_seed(0)
    return UNet2D(**SMALL)


def sampled(sampler):
    return sampler.sample(3, **SETTINGS)


SAMPLERS = {
    "UNet2D": lambda: Sampler(unet(), SCHEDULE, device="cpu", precision="bf16", batch_invariant=2),
    "network": lambda: Sampler(Network(), SCHEDULE, shape=(3,), device="cpu"),
    "float64": lambda: Sampler(Network().double(), SCHEDULE, shape=(3,), device="cpu"),
    "bundled": lambda: Sampler.from_pretrained(device="cpu", precision="fp32"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", SAMPLERS)
def test_a_copy_samples_the_same_bits(kind, way):
    """Before and after the first use; and the original goes on."""
    sampler = SAMPLERS[kind]()
    unused = WAYS[way](sampler)
    want = sampled(sampler)
    for made in (unused, WAYS[way](sampler), WAYS[way](WAYS[way](sampler))):
        assert torch.equal(sampled(made), want)
        assert repr(made) == repr(sampler)
        assert (made.schedule, made.shape, made.classes) == (sampler.schedule, sampler.shape, sampler.classes)
        assert (made.model is sampler.model) == (way == "copy")
        assert (made.engine is sampler.engine) == (way == "copy")
    assert torch.equal(sampled(sampler), want)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [Agent, OfItself, lambda: UNetOfItself(**SMALL)], ids=["agent", "itself", "UNet2D"])
@pytest.mark.filterwarnings("ignore:this UNet2D is called as it is")
def test_a_module_that_holds_a_sampler_is_copied(kind, way):
    owner = kind()
    want = sampled(owner.sampler)
    made = WAYS[way](owner)
    assert torch.equal(sampled(made.sampler), want)
    if way != "copy":
        assert made.sampler.model is (made.net if kind is Agent else made)


def test_averaged_weights_are_those_of_the_copied_sampler():
    agent = Agent()
    before = sampled(agent.sampler)
    average = AveragedModel(agent, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    average.update_parameters(agent)
    with torch.no_grad():
        for x in agent.parameters():
            x.mul_(0.5)
    average.update_parameters(agent)
    assert torch.equal(average.module.net.conv_in.weight, 1.5 * agent.net.conv_in.weight)
    assert not torch.equal(sampled(average.module.sampler), before)
    assert torch.equal(sampled(average.module.sampler), sampled(Sampler(average.module.net, SCHEDULE, device="cpu")))


def draw(sampler, queue):
    queue.put(sampled(sampler).tolist())


def test_a_sampler_is_sent_to_another_process():
    sampler, context = SAMPLERS["network"](), multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=draw, args=(sampler, queue))
    process.start()
    got = queue.get(timeout=120)
    process.join()
    assert got == sampled(sampler).tolist()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fused_network_is_copied_without_its_packed_weights(dtype, way):
    net, x = unet().for_inference(dtype), torch.ones(2, 1, 8, 8, dtype=dtype)
    want = net(x, 5)
    assert torch.equal(WAYS[way](net)(x, 5), want)
    plain = unet()
    plain(x.float(), 5)
    assert network_obstacles(WAYS[way](plain)) == {}


@pytest.mark.parametrize("way", WAYS)
def test_schedules_and_tables_are_copied(way):
    for schedule in (SCHEDULE, Schedule(3, trained_betas=[0.1, 0.2, 0.3])):
        made = WAYS[way](schedule)
        assert made == schedule
        assert torch.equal(made.alphas_cumprod, schedule.alphas_cumprod)
        assert torch.equal(WAYS[way](schedule.table(2)).rows, schedule.table(2).rows)


@pytest.mark.parametrize(("kind", "there"), [("graph", "eager"), ("compiled+graph", "compiled"), ("auto", "auto")])
def test_a_pickle_from_a_gpu_is_used_on_a_cpu(kind, there, monkeypatch):
    """If the machine has no such GPU; a warning says so."""
    monkeypatch.setattr(precision.torch.cuda, "is_available", lambda: False)
    on_gpu = Compute(torch.device("cuda:0"), "tf32")
    engine = Engine(Network(), (3,), 20, on_gpu, kind)
    with pytest.warns(UserWarning, match="device is 'cuda:0', which this machine does not have; .* in fp32"):
        made = pickle.loads(pickle.dumps(engine))
    assert (made.device.type, made.compute.precision, made.prepared.kind) == ("cpu", "fp32", there)


def test_repr_says_what_a_sampler_is():
    assert repr(SAMPLERS["UNet2D"]()) == (
        "Sampler(UNet2D, T=20, shape=(1, 8, 8), device='cpu', precision='bf16', engine='auto', batch_invariant=2)"
    )
    assert repr(Sampler(Network(), shape=(3,), device="cpu")) == (
        "Sampler(Network, T=1000, shape=(3,), device='cpu', precision='fp32', engine='auto')"
    )
    assert repr(Sampler(sampled, shape=(3,), device="cpu")).startswith("Sampler(sampled, T=1000")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert "\n" not in repr(Sampler.from_pretrained(device="cpu"))
