"""Copies parameters into a network, whatever format they were read from."""

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from fastddpm.checkpoints.reading import named


def load_into(module: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Copy parameters into module, keeping its dtype, device and memory format.

    Raises: ValueError: a parameter is missing, unexpected or of the wrong shape; then nothing is copied.
    """
    if not isinstance(module, nn.Module) or not isinstance(state_dict, Mapping):
        given = f"{type(module).__name__} and {type(state_dict).__name__}"
        raise ValueError(f"load_into: the arguments are {given}; want a network and its parameters by name")
    own = module.state_dict()
    reshaped = [
        f"{name} {tuple(state_dict[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own.keys() & state_dict.keys()
        if state_dict[name].shape != own[name].shape
    ]
    problems = {
        "missing": own.keys() - state_dict.keys(),
        "unexpected": state_dict.keys() - own.keys(),
        "of the wrong shape": reshaped,
    }
    if misfits := [f"{len(names)} {problem} ({first_few(names)})" for problem, names in problems.items() if names]:
        way_out = "build it from the config they were saved with"
        raise ValueError(f"the parameters do not fit the network: {', '.join(misfits)}; {way_out}")
    module.load_state_dict(state_dict)


def first_few(names: Iterable[str], shown: int = 3) -> str:
    """The first names in alphabetical order, for an error message."""
    names = sorted(names)
    return ", ".join([*map(named, names[:shown]), *["..."] * (len(names) > shown)])
