"""Checks of what a call gives its samples: an error says what came, what was wanted, and the way out."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastddpm.core.checks import flag, is_real, shape_of, shown, whole
from fastddpm.networks.fused import CONDITION, LABELS, argument_of, is_own
from fastddpm.sampling.arguments import checked_labels
from fastddpm.sampling.conditions import Conditions
from fastddpm.sampling.own_network import INDEX, accepts, takes

MOST_VISITS = 4096  # of a timestep: the noise of each has an address


@dataclass(frozen=True, eq=False, kw_only=True)
class ConditionArguments:
    """The arguments of `Sampler.batches` that it only passes on to `conditions`, under the same names."""

    class_labels: Any = None
    model_kwargs: Any = None
    concat: Any = None
    guidance_scale: Any = None
    uncond_kwargs: Any = None
    guide_variance: Any = False
    start: Any = None
    init: Any = None
    known: Any = None
    mask: Any = None
    resample: Any = 1
    x_0_fn: Any = None

    def conditions(
        self, count: int, *, model: Any, shape: tuple[int, ...], null_label: int | None, noising: Tensor | None
    ) -> Conditions:
        """These, checked, for so many samples.

        Args:
            model, shape: the network, and the shape of a sample.
            null_label: the class label that stands for no class; None: unknown.
            noising: see `Conditions`.
        Raises: ValueError: an argument is not as `Sampler.batches` says.
        """
        kwargs = self._kwargs(count, model)
        guidance, uncond = self._guidance(count, kwargs, model, null_label)
        known, mask = self._known(count, shape)
        self._check_x_0_fn()
        resample = whole("resample", self.resample, 1, MOST_VISITS)
        if resample > 1 and known is None:
            raise ValueError(f"resample is {resample}, but known and mask are missing; give both, or leave it out")
        return Conditions(
            kwargs=kwargs,
            uncond=uncond,
            guidance=guidance,
            guide_variance=flag("guide_variance", self.guide_variance),
            concat=self._concat(count, model, shape),
            known=known,
            mask=mask,
            start=_states("start", self.start, count, shape),
            init=_states("init", self.init, count, shape),
            noising=noising,
            resample=resample,
            x_0_fn=self.x_0_fn,
        )

    def _check_x_0_fn(self) -> None:
        wanted = "called as x_0_fn(x_0, t), or x_0_fn(x_0, t, sample_index=...), or None"
        if self.x_0_fn is None:
            return
        if not callable(self.x_0_fn) or not accepts(self.x_0_fn, {INDEX: None} if takes(self.x_0_fn, INDEX) else {}):
            raise ValueError(f"x_0_fn is {shown(self.x_0_fn)}; want a function, {wanted}")

    def _kwargs(self, count: int, model: Any) -> dict[str, Any]:
        given = {} if self.model_kwargs is None else self.model_kwargs
        if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
            raise ValueError(f"model_kwargs is {shown(given)}; want a dict of the network's arguments by their names")
        kwargs = {name: _per_sample(f"model_kwargs[{name!r}]", value, count) for name, value in given.items()}
        if not is_own(model):
            if self.class_labels is not None:
                raise ValueError(
                    "class_labels were given, but the model is not a class-conditional UNet2D or UNet1D; leave them "
                    "out, or pass them as model_kwargs={'class_labels': ...} to a network that takes an argument of "
                    "that name"
                )
            if INDEX in kwargs:
                raise ValueError(
                    f"model_kwargs has {INDEX}, which is filled in for a network that asks for it; leave it out"
                )
            return kwargs
        argument = argument_of(model)
        if unknown := kwargs.keys() - {argument or LABELS}:
            takes = f"it takes only {argument!r}" if argument else "it takes no model_kwargs: leave it out"
            raise ValueError(f"model_kwargs has {min(unknown)!r}, which this network does not take; {takes}")
        if argument == CONDITION:
            width = model.config["global_cond_dim"]
            given = kwargs.get(argument)
            if not isinstance(given, Tensor) or given.shape != (count, width) or not given.is_floating_point():
                raise ValueError(
                    f"model_kwargs[{argument!r}] is {shape_of(given)}; want ({count}, {width}), floating point: the "
                    "condition of each sample"
                )
            checked_labels(self.class_labels, count, model)
            return {argument: _floats(f"model_kwargs[{argument!r}]", given)}
        if kwargs and self.class_labels is not None:
            raise ValueError(f"{LABELS} are in model_kwargs, too; give them once")
        labels = checked_labels(kwargs.get(LABELS, self.class_labels), count, model)
        return {} if labels is None else {LABELS: labels}

    def _guidance(
        self, count: int, kwargs: dict[str, Any], model: Any, null_label: int | None
    ) -> tuple[Tensor | None, dict[str, Any]]:
        given = self.uncond_kwargs
        if self.guidance_scale is None:
            for name, value in (("uncond_kwargs", given), ("guide_variance", self.guide_variance or None)):
                if value is not None:
                    raise ValueError(f"{name} is {shown(value)}, but guidance_scale is missing; give it, too")
            return None, {}
        if isinstance(self.guidance_scale, Tensor | np.ndarray) and self.guidance_scale.dtype in (torch.bool, np.bool_):
            raise ValueError(f"guidance_scale is {shown(self.guidance_scale)}; want a number, or one per sample")
        if is_real(self.guidance_scale):
            scale = torch.full((count,), float(self.guidance_scale), dtype=torch.float32, device="cpu")
        else:
            scale = _tensor("guidance_scale", self.guidance_scale, count).float()
            if scale.shape != (count,) or not scale.isfinite().all():
                raise ValueError(f"guidance_scale is {shown(self.guidance_scale)}; want a number, or one per sample")
        if is_own(model) and given is None and null_label is not None:
            given = {LABELS: null_label}
        if not isinstance(given, Mapping) or not given:
            what = "{'y': the null condition, ...}"
            if is_own(model) and (argument := argument_of(model)):
                what = f"{{{argument!r}: the null {'label' if argument == LABELS else 'condition'}}}"
            raise ValueError(
                f"guidance_scale is given, but uncond_kwargs is {shown(given)}; want what the network is given instead "
                f"of the condition: uncond_kwargs={what}"
            )
        if unknown := given.keys() - kwargs.keys():
            known = ", ".join(kwargs) or "nothing"
            raise ValueError(
                f"uncond_kwargs has {min(unknown)!r}, which model_kwargs lacks (it has {known}); give the condition "
                "there, too, or as class_labels"
            )
        uncond = {name: _without(f"uncond_kwargs[{name!r}]", given[name], kwargs[name]) for name in given}
        if LABELS in uncond and is_own(model):
            try:
                checked_labels(uncond[LABELS], count, model)
            except ValueError as error:
                raise ValueError(f"uncond_kwargs, the null label: {error}") from error
        return scale, uncond

    def _concat(self, count: int, model: Any, shape: tuple[int, ...]) -> Tensor | None:
        channels, *spatial = shape
        takes = model.in_channels - channels if is_own(model) else None
        if self.concat is None:
            if takes and takes > 0:
                raise ValueError(
                    f"concat is missing; the network takes {takes} channels more than the {channels} of a sample: "
                    f"want [{count}, {takes}, {', '.join(map(str, spatial))}]"
                )
            return None
        if takes is not None and takes <= 0:
            raise ValueError(
                f"concat is given, but the network takes just the {channels} channels of x_t; leave it out"
            )
        concat = _tensor("concat", self.concat, count)
        if concat.ndim != len(shape) + 1 or list(concat.shape[2:]) != spatial or takes not in (None, concat.shape[1]):
            wanted = ", ".join(map(str, [count, "C" if takes is None else takes, *spatial]))
            raise ValueError(f"concat is {tuple(concat.shape)} for samples of {shape}; want [{wanted}]")
        return _floats("concat", concat)

    def _known(self, count: int, shape: tuple[int, ...]) -> tuple[Tensor | None, Tensor | None]:
        if (self.known is None) != (self.mask is None):
            name, other = ("known", "mask") if self.known is None else ("mask", "known")
            raise ValueError(f"{other} is given, but {name} is missing; give both: mask is true where known holds x_0")
        if self.known is None:
            return None, None
        return _states("known", self.known, count, shape), _mask(self.mask, count, shape)


def _mask(given: Any, count: int, shape: tuple[int, ...]) -> Tensor:
    """[count, *shape] bool."""
    mask = _tensor("mask", given, None)
    if mask.dtype != torch.bool:
        if not ((mask == 0) | (mask == 1)).all():
            raise ValueError("mask has values besides 0 and 1; want 1 (or True) where x_0 is known, else 0")
        mask = mask != 0
    spatial = shape[1:]
    wanted = f"[1, {', '.join(map(str, shape))}] for all samples, or [{count}, 1, ...] with one per sample"
    if mask.shape == shape and 1 < shape[0] == count:
        raise ValueError(
            f"mask is {tuple(mask.shape)} for {count} samples, which may be meant in two ways; want {wanted}"
        )
    if spatial and mask.shape == spatial:
        mask = mask[None]
    if mask.shape in (shape, (1, *spatial)) and (spatial or mask.shape == shape):
        mask = mask[None]
    if mask.ndim != len(shape) + 1 or mask.shape[0] not in (1, count) or mask.shape[2:] != spatial:
        raise ValueError(
            f"mask is {tuple(mask.shape)} for {count} samples of {shape}; want {shape}, {spatial}, {wanted}"
        )
    if mask.shape[1] not in ((1, shape[0]) if spatial else shape):
        raise ValueError(f"mask is {tuple(mask.shape)} for {count} samples of {shape}; want 1 or {shape[0]} channels")
    return mask.expand(count, *shape)


def _tensor(name: str, value: Any, count: int | None) -> Tensor:
    """A tensor or an array as a dense tensor that needs no gradient, with one entry per sample unless count is None."""
    try:
        if not isinstance(value, Tensor):
            value = torch.from_numpy(np.require(value, requirements=["C", "W"]))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is {shown(value)}; want a tensor or an array") from error
    if value.layout != torch.strided or value.is_meta:
        raise ValueError(
            f"{name} is a {'meta' if value.is_meta else value.layout} tensor; want a dense one with values"
        )
    if count is not None and value.shape[:1] != (count,):
        raise ValueError(f"{name} is {tuple(value.shape)} for {count} samples; want one entry per sample")
    return value.detach()


def _floats(name: str, value: Tensor) -> Tensor:
    if not value.is_floating_point():
        raise ValueError(f"{name} is {value.dtype}; want floating-point numbers in data units, such as [-1, 1]")
    if value.device.type == "cpu" and not value.isfinite().all():
        raise ValueError(f"{name} has NaN or infinity; want finite numbers")
    return value.float()


def _states(name: str, value: Any, count: int, shape: tuple[int, ...]) -> Tensor | None:
    """[count, *shape] float32, or None."""
    if value is None:
        return None
    value = _tensor(name, value, count)
    if value.shape != (count, *shape):
        raise ValueError(f"{name} is {tuple(value.shape)} for {count} samples of {shape}; want {(count, *shape)}")
    return _floats(name, value)


def _per_sample(name: str, value: Any, count: int) -> Any:
    """An argument of the network.

    Tensors, arrays and lists of numbers (in any nesting that makes an array) have an entry per sample. Dicts, and lists
    or tuples of tensors, are searched for them; numbers, strings and None are the same for all samples.
    """
    if value is None or isinstance(value, bool | str) or is_real(value):
        return value
    if isinstance(value, Tensor | np.ndarray):
        return _tensor(name, value, count)
    if type(value) is dict:
        return {key: _per_sample(f"{name}[{key!r}]", inner, count) for key, inner in value.items()}
    if type(value) in (list, tuple):
        leaves = tree_leaves(value)
        if leaves and all(isinstance(leaf, Tensor | np.ndarray | None) for leaf in leaves):
            return type(value)(_per_sample(f"{name}[{i}]", inner, count) for i, inner in enumerate(value))
        if leaves and all(isinstance(leaf, bool) or is_real(leaf) for leaf in leaves):
            return _tensor(name, np.asarray(value), count)
    raise ValueError(
        f"{name} is {shown(value)}; want a tensor, an array or a list of numbers with one entry per sample, a dict or "
        "a list of tensors, or a number, a string or None, which is the same for all samples"
    )


def _without(name: str, value: Any, condition: Any) -> Any:
    """An argument of the evaluation without the condition, of the shape that the condition has."""
    if isinstance(condition, Mapping | list | tuple):
        is_same = isinstance(value, type(condition)) and len(value) == len(condition)
        if not is_same or (isinstance(condition, Mapping) and value.keys() != condition.keys()):
            raise ValueError(f"{name} is {shown(value)}; want the structure that model_kwargs has there")
        if isinstance(condition, Mapping):
            return {key: _without(f"{name}[{key!r}]", value[key], inner) for key, inner in condition.items()}
        return type(condition)(_without(f"{name}[{i}]", value[i], inner) for i, inner in enumerate(condition))
    if not isinstance(condition, Tensor):
        if value is not condition and value != condition:
            raise ValueError(
                f"{name} is {shown(value)}, but {shown(condition)} in model_kwargs; want the same value, or in "
                "model_kwargs a tensor with one entry per sample"
            )
        return value
    tensor = _tensor(name, np.asarray(value) if is_real(value) else value, None).to(condition.device)
    held = tensor if condition.is_floating_point() else tensor.to(condition.dtype)
    if not tensor.isfinite().all() or not held.eq(tensor).all():
        raise ValueError(f"{name} is {shown(value)}; want finite numbers of {condition.dtype}, as in model_kwargs")
    if tensor.shape == condition.shape[1:]:
        tensor = tensor[None]
    if tensor.shape[1:] != condition.shape[1:] or len(tensor) not in (1, len(condition)):
        raise ValueError(
            f"{name} is {tuple(tensor.shape)}, but {tuple(condition.shape)} in model_kwargs; want the same shape, or "
            "that of one sample, for all"
        )
    return tensor.to(condition.dtype).expand(condition.shape)


def arguments(conditions: Conditions) -> dict[str, Any]:
    """Checked conditions as arguments of `Sampler.batches`; those that are not given are left out."""
    named = {
        "model_kwargs": dict(conditions.kwargs),
        "guidance_scale": conditions.guidance,
        "uncond_kwargs": dict(conditions.uncond),
        "guide_variance": conditions.guide_variance,
        **{name: getattr(conditions, name) for name in ("concat", "known", "mask", "start", "init", "x_0_fn")},
    }
    found = {name: value for name, value in named.items() if value is not None and value is not False and value != {}}
    return found | ({"resample": conditions.resample} if conditions.resample > 1 else {})
