"""How objects of this package's classes pass for diffusers' own when they are saved, loaded and compared."""

import functools
import os
from collections.abc import Callable
from typing import Any

from fastddpm.checkpoints.shipped import shipped_model
from fastddpm.core.names import SHIPPED_IMAGES

PACKAGE = "diffusers."

_SOURCE = "pretrained_model_name_or_path"

OURS: dict[type, type] = {}  # diffusers' class -> ours of the same name


class Disguised:
    """A base class, listed before diffusers' class, of each class that replaces one.

    An instance has the `__module__` of diffusers' class: diffusers writes it into model_index.json, so plain diffusers
    can load what was saved. The class itself keeps its module, so that it can be imported and pickled.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for base in cls.__bases__:
            if base.__module__.startswith(PACKAGE):
                OURS[base] = cls
                cls.from_pretrained = classmethod(_loading(base.from_pretrained.__func__))  # type: ignore[attr-defined]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return _disguise(super().__new__(cls))


def adopt(part: Any) -> Any:
    """Turn an object of one of diffusers' classes into one of ours, in place; anything else is returned as it is."""
    if type(part) in OURS:
        part.__class__ = OURS[type(part)]
        _disguise(part)
    return part


def _loading(load: Callable[..., Any]) -> Callable[..., Any]:
    """A `from_pretrained` of diffusers that also loads the bundled models, by their names."""

    @functools.wraps(load)
    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        source = args[0] if args else kwargs.get(_SOURCE)
        if source in SHIPPED_IMAGES and not os.path.isdir(source):
            found = str(shipped_model(source))
            args, kwargs = ((found, *args[1:]), kwargs) if args else (args, kwargs | {_SOURCE: found})
        return load(cls, *args, **kwargs)

    return from_pretrained


def _disguise(instance: Any) -> Any:
    """Give an instance the `__module__` of diffusers' class; not if it is of a user's own subclass."""
    replaced = {ours: theirs for theirs, ours in OURS.items()}.get(type(instance))
    if replaced is not None:
        instance.__dict__["__module__"] = replaced.__module__
    return instance
