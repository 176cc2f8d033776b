"""Class labels on the command line: by number or by name, and those that a model is given without being asked."""

import re
from argparse import ArgumentTypeError
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from fastddpm.cli.options import MOST_NUMBERS, number_list
from fastddpm.core.checks import shown
from fastddpm.storage.indices import Indices

if TYPE_CHECKING:
    from fastddpm.sampling.sampler import Sampler


def class_labels(given: str | None, sampler: "Sampler", samples: Indices) -> Indices | None:
    """The labels of some samples, which are to be repeated over them; None for a model without classes.

    Args: given: the option --class-labels; None: every class in turn.
    Raises: ValueError: the option is not as `parse_labels` reads it, or the model does not have these classes.
    """
    if given is None:
        return _every_class(sampler, samples)
    labels = Indices.of(parse_labels(given, sampler.classes))
    if not 0 < len(labels) <= len(samples):
        counts = f"{len(labels)} classes for {len(samples)} samples"
        raise ValueError(f"--class-labels lists {counts}; want at least one class, and at most one per sample")
    ends = [*labels.starts.tolist(), labels.largest()]  # of runs of classes
    sampler.checked_labels(ends, len(ends))
    return labels


def parse_labels(text: str, names: Sequence[str] | None) -> Sequence[int]:
    """The class labels that an option lists, as numbers: 0,3-5 or trousers,bag.

    Args: names: of the model's classes 0, 1, ...; None: unknown.
    Raises: ValueError: an entry is neither a number, a range nor a name; or it is the number of one class and the name
        of another.
    """
    number = {name: k for k, name in enumerate(names or ())}
    entries = _entries(text, number)
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
        elif _means_others(entry, number[entry], len(number)):
            also, way_out = "a range of numbers", "list the numbers"
            if entry.isdecimal():
                also, way_out = "the number of another", f"{entry}-{entry} for that of the number {entry}"
            raise ValueError(
                f"--class-labels has {entry}, which is the name of class {number[entry]} and {also}; write "
                f"{number[entry]}-{number[entry]} for the class named {entry}, or {way_out}"
            )
        else:
            labels.append(number[entry])
    return labels


def _means_others(entry: str, label: int, classes: int) -> bool:
    """Whether a name of class `label` is also a number or a range of numbers of classes, and not that of this class."""
    if "-" not in entry:
        return entry in map(str, range(classes)) and int(entry) != label
    try:
        found = Indices.parse(entry)
    except ValueError:
        return False
    return found.largest() < classes and list(found[:2]) != [label]


def _every_class(sampler: "Sampler", samples: Indices) -> Indices | None:
    """For a model with K classes, the label i mod K of each sample i; never the null label."""
    config = getattr(sampler.model, "config", {})
    classes = config.get("num_class_embeds") if config.get("class_embed_type") is None else None
    classes = classes if sampler.null_label is None else sampler.null_label
    if classes is None:
        return None
    if len(samples.starts) == 1:
        return Indices.of([index % classes for index in samples[:classes]])
    if len(samples) > MOST_NUMBERS:
        raise ValueError(f"the model is class-conditional; give --class-labels for so many samples, {len(samples)}")
    return Indices.of([index % classes for index in samples])


def _entries(text: str, names: Iterable[str]) -> list[str]:
    """What a text lists, separated by commas, which names may contain as well."""
    with_commas = sorted((name for name in names if "," in name), key=len, reverse=True)
    entry = "|".join([*map(re.escape, with_commas), "[^,]*"])
    return [found.strip() for found in re.findall(rf"(?:^|,)\s*({entry})\s*(?=,|$)", text) if found.strip()]


def _numbers(entry: str, names: Sequence[str]) -> Sequence[int]:
    try:
        return number_list(entry)
    except (ValueError, ArgumentTypeError) as error:
        few = ", ".join(names[:20]) + ", ..." * (len(names) > 20)
        raise ValueError(f"--class-labels has {shown(entry)}; want a number, or one of {few}") from error
