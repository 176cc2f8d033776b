"""What sets a network apart from the one that its configuration describes.

A fused copy is made of a configuration and of parameters. Whatever else decides a network's output is an obstacle:
hooks, methods and parts that were replaced, attributes that were changed. `obstacles` compares the network with one as
configured, attribute by attribute, so it need not know all the ways in which a network can be changed.
"""

from collections.abc import Iterable, Iterator
from types import BuiltinFunctionType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as all_modules

from fastddpm.core.checks import shown
from fastddpm.storage.fingerprint import CALLS

# a change, as a plain sentence: what was found; equal dictionaries mean equal changes
Obstacles = dict[str, Any]

WITHOUT_EFFECT = (  # on the output
    *("training", "gradient_checkpointing"),
    *("reset_parameters", "extra_repr", "for_inference", "refresh"),
)
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

ALIKE: dict[type, type] = {}  # classes of attributes that compute the same: class: the one that it is compared as

_originals: dict[type, dict[str, Any]] = {}  # class: its attributes, as it defines them itself


class Part(NamedTuple):
    """What a module should be.

    Attributes:
        kind: its class.
        names: of all its attributes.
        children: the names of its own parts, in their order.
        values: those that may decide its output, in the form of `_comparable`.
        tensors: its parameters and buffers, in the form of `_described`.
    """

    kind: type
    names: frozenset[str]
    children: tuple[str, ...]
    values: dict[str, Any]
    tensors: dict[str, Any]


def remember(kinds: Iterable[object]) -> None:
    """Keep the methods of the classes of modules among some objects, to notice later that one was replaced."""
    for kind in kinds:
        if isinstance(kind, type) and issubclass(kind, nn.Module):
            names = CALLS if kind is nn.Module else filter(_has_effect, vars(kind))
            _originals.setdefault(kind, {name: vars(kind)[name] for name in names if name in vars(kind)})


def parts(network: nn.Module) -> dict[str, Part]:
    """The parts of a network, which should be those of another one too, by name."""
    return {
        name: Part(
            type(module),
            frozenset(vars(module)),
            tuple(module._modules),
            dict(_values(module)),
            dict(_tensors(module)),
        )
        for name, module in network.named_modules(remove_duplicate=False)
    }


def obstacles(network: nn.Module, expected: dict[str, Part]) -> Obstacles:
    """What decides a network's output, except for the values of its parameters, and is not as expected.

    The class of the network itself is not compared. Backward hooks and hooks of state_dict do not count.
    """
    found: Obstacles = {}
    if any(map(global_hooks, HOOKS)):
        found["torch has global module hooks"] = list(map(global_hooks, HOOKS))
    found.update(_replaced_methods([type(network), *(part.kind for part in expected.values())]))
    modules = dict(network.named_modules(remove_duplicate=False))
    for name, part in expected.items():
        if name in modules:
            found.update(_differences(name, modules[name], part))
        else:
            found[f"{name} is missing"] = None
    for name, module in modules.items():
        if name not in expected:
            found[f"{name} is not in its configuration"] = _summary(module)
    return found


def global_hooks(kind: str) -> tuple[int, ...]:
    """The numbers of the hooks that all modules have, which torch gives to no other hook. Args: kind: one of HOOKS."""
    return tuple(getattr(all_modules, f"_global{kind}"))


def called_as_it_is(network: str, found: Obstacles) -> str:
    """What a warning says of a network that is not fused. Args: network: its kind; found: at least one obstacle."""
    first, others = next(iter(found)), len(found) - 1
    more = f" (and {others} more change{'s' * (others > 1)})" if others else ""
    return f"this {network} is called as it is, which is slower than a fused copy, because {first}{more}"


def _differences(name: str, module: nn.Module, part: Part) -> Iterator[tuple[str, Any]]:
    """In what a module is not as expected: pairs of `Obstacles`."""
    it, attributes = name or "it", vars(module)
    if name and type(module) is not part.kind:
        came, want = type(module).__name__, part.kind.__name__
        if came == want:
            came, want = (f"{kind.__module__}.{kind.__name__}" for kind in (type(module), part.kind))
        yield f"{name} is of the class {came}, not {want}", _summary(module)
        return
    if any(attributes[hooks] for hooks in HOOKS):
        yield f"{it} has hooks", _hooks(module)
    if attributes.get("_compiled_call_impl") is not None:
        yield f"{it} is compiled", None
    children = tuple(module._modules)
    if children != part.children and set(children) == set(part.children):
        yield f"the parts of {it} are in another order", children
    prefix = f"{name}." if name else ""
    for key, want in part.values.items():
        came = _comparable(attributes.get(key))
        if came is not want and came != want:
            yield f"{prefix}{key} is {_text(came)}, not {_text(want)}", came
    for key in attributes.keys() - part.names:
        # an attribute of one's own has no effect, unless it hides one that the class has
        hides = hasattr(part.kind, key) and not isinstance(getattr(part.kind, key), property)
        if hides and _has_effect(key) and (key in CALLS or not hasattr(nn.Module, key)):
            yield f"{prefix}{key} was replaced", attributes[key]
    tensors = dict(_tensors(module))
    if tensors != part.tensors:
        for key in {**part.tensors, **tensors}:
            if key not in part.tensors:
                yield f"{prefix}{key} is not in its configuration", tensors[key]
            elif tensors.get(key) != part.tensors[key]:
                yield f"{prefix}{key} is {_text(tensors.get(key))}, not {_text(part.tensors[key])}", tensors.get(key)


def _replaced_methods(kinds: Iterable[type]) -> Iterator[tuple[str, Any]]:
    """The methods that classes no longer have as they were remembered: pairs of `Obstacles`."""
    for base in dict.fromkeys(base for kind in dict.fromkeys(kinds) for base in kind.__mro__ if base in _originals):
        current, originals = vars(base), _originals[base]
        for name in (*originals, *CALLS):
            if current.get(name) is not originals.get(name):
                yield f"{base.__name__}.{name} was replaced", current.get(name)


def _values(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The attributes that may decide what a module computes."""
    for key, value in vars(module).items():
        if not key.startswith("_") and _has_effect(key) and not isinstance(value, Tensor):
            yield key, _comparable(value)


def _tensors(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, value in (*module._parameters.items(), *module._buffers.items()):
        yield name, _described(value)


def _described(value: Tensor | None) -> Any:
    """The shape of an ordinary tensor of real numbers; of any other one, what it is."""
    if value is None:
        return None
    if type(value) in (nn.Parameter, Tensor) and value.layout is torch.strided and value.dtype in FLOATS:
        return value.shape
    return f"a {type(value).__name__}, {value.layout}, {value.dtype}"


def _comparable(value: Any) -> Any:
    """A value that can be compared with that of another network; of an object only its type."""
    if isinstance(value, tuple | list):
        return tuple(map(_comparable, value))
    if isinstance(value, dict):
        return {key: _comparable(entry) for key, entry in value.items()}
    simple = (type, int, float, str, torch.dtype, torch.device, FunctionType, BuiltinFunctionType)
    return value if value is None or isinstance(value, simple) else ALIKE.get(type(value), type(value))


def _summary(module: nn.Module) -> Any:
    """What a module of any class is, as far as it can be compared."""
    return type(module), _hooks(module), dict(_values(module)), dict(_tensors(module))


def _hooks(module: nn.Module) -> tuple[int, ...]:
    """The numbers of a module's hooks, which torch gives only once."""
    return tuple(number for hooks in HOOKS for number in getattr(module, hooks))


def _has_effect(name: str) -> bool:
    """Whether an attribute of a module or of its class may decide what it computes."""
    return name in CALLS or not (name.startswith("__") or name in WITHOUT_EFFECT)


def _text(value: Any) -> str:
    """How a sentence names a value."""
    if isinstance(value, torch.Size):
        return str(tuple(value))
    if value is None:
        return "None"
    return value.__name__ if isinstance(value, type | FunctionType | BuiltinFunctionType) else shown(value)
