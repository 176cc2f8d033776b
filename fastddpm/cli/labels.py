"""Class labels on the command line: by number or by name, and those that a model is given without being asked."""

from argparse import ArgumentTypeError
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastddpm.cli.options import number_list
from fastddpm.core.checks import shown
from fastddpm.storage.indices import Indices

if TYPE_CHECKING:
    from fastddpm.sampling.sampler import Sampler


def parse_labels(text: str, names: Sequence[str] | None) -> Sequence[int]:
    """The class labels that an option lists, as numbers: 0,3-5 or trousers,bag.

    Args: names: of the model's classes 0, 1, ...; None: unknown.
    Raises: ValueError: an entry is neither a number, a range nor a name; or it is the number of one class and the name
        of another.
    """
    number = {name: k for k, name in enumerate(names or ())}
    entries = [entry.strip() for entry in text.split(",") if entry.strip()]
    if not any(entry in number for entry in entries):
        try:
            return Indices.parse(text)
        except ValueError as error:
            if not names:
                way_out = "the checkpoint does not name its classes; want numbers, such as 0,3-5"
                raise ValueError(f"--class-labels is {shown(text)}, but {way_out}") from error
    labels: list[int] = []
    for entry in entries:
        if entry not in number:
            labels += _numbers(entry, names or ())
        elif entry.isascii() and entry.isdigit() and int(entry) != number[entry]:
            raise ValueError(
                f"--class-labels has {entry}, the name of class {number[entry]}; want a range for the class of a "
                f"number: {number[entry]}-{number[entry]}, or {int(entry)}-{int(entry)}"
            )
        else:
            labels.append(number[entry])
    return labels


def every_class(sampler: "Sampler", samples: Indices) -> Sequence[int] | None:
    """For a model with K classes, the label i mod K of each sample i; None for a model without classes."""
    config = getattr(sampler.model, "config", {})
    classes = config.get("num_class_embeds") if config.get("class_embed_type") is None else None
    if classes is None:
        return None
    if str(samples) == str(Indices.of(len(samples))):  # labels are repeated over the samples
        return range(min(classes, len(samples)))
    return [index % classes for index in samples]


def _numbers(entry: str, names: Sequence[str]) -> Sequence[int]:
    try:
        return number_list(entry)
    except (ValueError, ArgumentTypeError) as error:
        few = ", ".join(names[:20]) + ", ..." * (len(names) > 20)
        raise ValueError(f"--class-labels has {shown(entry)}; want a number, or one of {few}") from error
