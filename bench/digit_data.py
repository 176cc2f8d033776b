"""The Free Spoken Digit Dataset as one file for `fastddpm train`, `bench.digit_classifier` and `bench.digits`.

    git clone https://github.com/Jakobovski/free-spoken-digit-dataset
    python -m bench.digit_data free-spoken-digit-dataset/recordings digits.npz

Of each digit and speaker, the recordings 0 to 4, such as 7_jackson_0.wav, are the test set. Clips are scaled to a peak
of 0.95 and filled with zeros to 6144 samples (0.77 s); the few longer ones are left out. Needs fastddpm[audio].
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastddpm.storage.audio import FULL_SCALE, read_pcm
from fastddpm.storage.files import atomic

RATE, LENGTH, PEAK, TEST = 8000, 6144, 0.95, 5  # Hz, samples, of full scale, recordings of the test set


def collect(folder: Path) -> dict[str, np.ndarray]:
    """x_train and x_test, int16 [N, 6144], with their digits y_train and y_test, sorted by name.

    Raises: ValueError: the folder holds no such recordings, or they have another rate.
    """
    found: dict[str, list] = {name: [] for name in ("x_train", "y_train", "x_test", "y_test")}
    for path in sorted(folder.glob("*.wav")):
        name = re.fullmatch(r"(\d)_\w+_(\d+)", path.stem)
        samples, rate = read_pcm(path)
        if not name:
            raise ValueError(f"{path} is no recording of the dataset; want names such as 7_jackson_12.wav")
        if rate != RATE:
            raise ValueError(f"{path} has {rate} Hz; want {RATE} Hz")
        if len(samples) > LENGTH:
            continue
        clip = np.zeros(LENGTH)
        clip[: len(samples)] = samples * (PEAK * FULL_SCALE / max(1, np.abs(samples.astype(int)).max()))
        part = "test" if int(name[2]) < TEST else "train"
        found[f"x_{part}"].append(clip.round().astype(np.int16))
        found[f"y_{part}"].append(int(name[1]))
    if not found["x_train"] or not found["x_test"]:
        raise ValueError(f"{folder} lacks recordings to train or to test; want the folder recordings of the dataset")
    return {name: np.stack(values) for name, values in found.items()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.digit_data", formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__
    )
    parser.add_argument("folder", type=Path, help="the recordings")
    parser.add_argument("out", metavar="DIGITS.npz")
    args = parser.parse_args(argv)
    try:
        arrays = collect(args.folder)
        with atomic(args.out) as file:
            np.savez_compressed(file, **arrays, sample_rate=RATE)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{args.out}: {len(arrays['x_train'])} clips to train, {len(arrays['x_test'])} to test")


if __name__ == "__main__":
    main()
