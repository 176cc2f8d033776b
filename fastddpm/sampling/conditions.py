"""What the samples of a run are given besides their noise, such as a class or a known part; checked, one row each."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._pytree import tree_map

X0Function = Callable[..., Tensor]  # (x_0 [n, *shape], t [n] int64) -> x_0, and sample_index if it has this argument


class InputForm(NamedTuple):
    """What decides the shape of a network's input besides the batch: concatenated channels, and guidance.

    With guidance the network is evaluated with and without the condition, so its batch has twice the entries.
    """

    concat: int = 0
    guided: bool = False


@dataclass(frozen=True, eq=False)
class Conditions:
    """What N samples are given; by default nothing. Tensors are [N, ...] on any device.

    Attributes:
        kwargs: named arguments of the network: tensors, in any nesting of dicts, lists and tuples, and plain values,
            which are the same for all samples.
        uncond: with guidance, the arguments that differ in the network's second evaluation, like kwargs.
        guidance: float32: the scale of each sample; None: no guidance.
        guide_variance: whether guidance applies to the second half of the network's channels, too.
        concat: float32: channels that follow those of x_t.
        known, mask: float32, and bool of the same shape: where x_0 is known.
        start: float32: the states to begin with.
        init: float32: the x_0 of these states, which are noised to the first timestep.
        noising: [2] float32: sqrt(abar_t) and sqrt(1 - abar_t) there.
        resample: how often each step but the last is taken.
        x_0_fn: changes the predicted x_0 in each step.
    """

    kwargs: Mapping[str, Any] = field(default_factory=dict)
    uncond: Mapping[str, Any] = field(default_factory=dict)
    guidance: Tensor | None = None
    guide_variance: bool = False
    concat: Tensor | None = None
    known: Tensor | None = None
    mask: Tensor | None = None
    start: Tensor | None = None
    init: Tensor | None = None
    noising: Tensor | None = None
    resample: int = 1
    x_0_fn: X0Function | None = None

    @property
    def form(self) -> InputForm:
        return InputForm(0 if self.concat is None else self.concat.shape[1], self.guidance is not None)

    def take(self, places: Tensor) -> "Conditions":
        """The conditions of these samples. Args: places: [n] int64, on the CPU."""

        def taken(x: Any) -> Any:
            return x.index_select(0, places.to(x.device)) if isinstance(x, Tensor) else x

        names = "kwargs", "uncond", "guidance", "concat", "known", "mask", "start", "init"
        return replace(self, **{name: tree_map(taken, getattr(self, name)) for name in names})


NOTHING = Conditions()
