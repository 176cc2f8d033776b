"""How objects of this package's classes pass for diffusers' own, where those are saved, loaded and compared."""

from typing import Any

THEIRS = "diffusers."

OURS: dict[type, type] = {}  # by diffusers' class of the same name


class Disguised:
    """Base, before diffusers' class, of each class that stands for it.

    An instance (not the class, which can be imported and pickled) names the module of diffusers' class: that is what
    diffusers writes into model_index.json, and so plain diffusers loads what was saved.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for base in cls.__bases__:
            if base.__module__.startswith(THEIRS):
                OURS[base] = cls

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return _disguise(super().__new__(cls))


def adopt(part: Any) -> Any:
    """The same object, made one of our class if its class is diffusers' own: identity and state stay."""
    if type(part) in OURS:
        part.__class__ = OURS[type(part)]
        _disguise(part)
    return part


def _disguise(instance: Any) -> Any:
    theirs = {ours: theirs for theirs, ours in OURS.items()}.get(type(instance))  # none for a user's own subclass
    if theirs is not None:
        instance.__dict__["__module__"] = theirs.__module__
    return instance
