"""How good are sampled names, and what does the noise of the reverse step do for them?

    python -m bench.names TRAIN.txt HELD-OUT.txt --num-samples 1000

The yardstick is a 5-gram model of the letters of the training names: how many bits per letter it needs for the samples,
for held-out names and for its own samples. Beside that: how many samples are valid codes, new, among the held-out
names, and different from each other. Prints a table for docs/sigma.md, and draws names.
"""

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.ngram import NGram, bits_per_letter
from fastddpm import Sampler
from fastddpm.core.names import SHIPPED_TEXTS
from fastddpm.storage.files import atomic
from fastddpm.storage.plots import new_figure, with_error
from fastddpm.text import Text, read_texts

SETTINGS = {  # title: (factor of the noise, whether the predicted x_0 are replaced by the nearest letters)
    "with σ_t z": (1.0, False),
    "with half of σ_t z": (0.5, False),
    "without σ_t z": (0.0, False),
    "with σ_t z, rounded": (1.0, True),
}
PICTURED = 3  # the first ones
SHOWN, DRAWN = 12, 36  # names of each set in the table, and in the picture


@dataclass(frozen=True)
class Measured:
    """A set of names. All shares are of the valid ones, except for `valid` itself.

    Attributes:
        bits: per letter, and the standard error.
        valid: share of the samples whose symbols are a name and nothing after its end.
        new: share that the training names lack; held_out: share among the held-out names.
        distinct: number of distinct names / number of names.
        letters: their mean length.
        shown: the first ones.
    """

    title: str
    bits: tuple[float, float]
    valid: float
    new: float
    held_out: float
    distinct: float
    letters: float
    shown: list[str]


def measure(
    title: str, names: Sequence[str], model: NGram, train: set[str], held_out: set[str], valid: float = 1.0
) -> Measured:
    """Measure valid names. Args: valid: the share of them among what was drawn."""
    n = len(names)
    return Measured(
        title,
        bits_per_letter(model.bits(names), names),
        valid,
        sum(name not in train for name in names) / n,
        sum(name in held_out for name in names) / n,
        len(set(names)) / n,
        sum(map(len, names)) / n,
        list(names[:DRAWN]),
    )


def measure_samples(
    sampler: Sampler, title: str, num_samples: int, model: NGram, train: set[str], held_out: set[str]
) -> Measured:
    """Draw names, and measure those that are valid. Raises: ValueError: none is."""
    medium = sampler.medium
    assert isinstance(medium, Text)
    noise, rounded = SETTINGS[title]
    x = sampler.sample(num_samples, noise=noise, x_0_fn=medium.nearest if rounded else None)
    good = medium.is_valid(x)
    names = [name for name in medium.decode(x[good]) if name]
    if not names:
        raise ValueError(f"none of the {num_samples} samples {title} is a name; train longer")
    return measure(title, names, model, train, held_out, len(names) / num_samples)


def markdown(found: Sequence[Measured]) -> str:
    """The measures as a Markdown table."""
    lines = [
        "| names | bits per letter | valid | new | held out | different | letters |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for one in found:
        shares = (f"{100 * share:.1f} %" for share in (one.valid, one.new, one.held_out, one.distinct))
        lines.append(f"| {' | '.join([one.title, with_error(*one.bits), *shares, f'{one.letters:.2f}'])} |")
    lines += ["", *(f"- {one.title}: {', '.join(one.shown[:SHOWN])}" for one in found)]
    return "\n".join(lines)


def plot(found: Sequence[Measured], path: str | os.PathLike[str]) -> None:
    """Write the first names of each set in three columns below its title."""
    with new_figure(path, (11, 3.4), dpi=100, layout="constrained") as figure:
        for axes, one in zip(figure.subplots(1, len(found)), found, strict=True):
            axes.set_axis_off()
            axes.set_title(f"{one.title}: {100 * one.distinct:.1f} % different", loc="left")
            for n, name in enumerate(one.shown):
                row, column = divmod(n, 3)
                axes.text(column / 3, 1 - (row + 0.5) / (DRAWN / 3), name, va="center", transform=axes.transAxes)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.names", formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__
    )
    parser.add_argument("train", help="training names, one per line")
    parser.add_argument("held_out", help="names that were held out")
    parser.add_argument(
        "--checkpoint", default=SHIPPED_TEXTS, metavar="FOLDER", help="a model of names (default: %(default)s)"
    )
    parser.add_argument("--num-samples", type=int, default=1000, metavar="N", help="of each setting (default: 1000)")
    parser.add_argument("--out", metavar="PNG", help="draw names of each setting")
    parser.add_argument("--json", metavar="FILE", help="also write the measures")
    args = parser.parse_args(argv)
    try:
        train, held_out = read_texts(args.train), read_texts(args.held_out)
        sampler = Sampler.from_pretrained(args.checkpoint)
        if not isinstance(sampler.medium, Text):
            raise ValueError(f"{args.checkpoint} does not draw texts; want a model of names")
        model = NGram(sampler.medium.alphabet).fit(train)
        sets = set(train), set(held_out)
        found = [measure_samples(sampler, title, args.num_samples, model, *sets) for title in SETTINGS]
        found.append(measure("held-out names", held_out, model, *sets))
        found.append(measure("drawn from the 5-gram model", model.sample(args.num_samples), model, *sets))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if args.out:
        plot(found[:PICTURED], args.out)
    if args.json:
        with atomic(Path(args.json)) as file:
            file.write((json.dumps([asdict(one) for one in found], indent=1) + "\n").encode())
    print(markdown(found))


if __name__ == "__main__":
    main()
