"""`fastddpm fid`: the Fréchet distance between two sets of images."""

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING

from fastddpm.cli.options import add_batch_size, add_device, add_seed, json_text
from fastddpm.core.names import SCALE_NAMES, SHIPPED_CLASSIFIER

if TYPE_CHECKING:
    from fastddpm.evaluate.fid import Fid

SUMMARY = "measure the Fréchet distance between two sets of images"
EPILOG = """
examples:
  fastddpm fid fashion-mnist.npz:x_test samples.npz                  garments, with the bundled classifier
  fastddpm fid cifar10.npz samples/ --features inception.pt          the FID, with an Inception network of your own
  fastddpm fid cifar10-stats.npz samples/ --features inception.onnx  published mean and covariance

A and B are each an .npz, .npy or MNIST-format file, a folder, .zip or .tar of images, which may be of several sizes, or
a folder written by `fastddpm sample`; an .npz with mu and sigma holds statistics. Statistics computed from images are
cached, and the output says where; the network does not run again for the same images. From an .npz the array x_train,
x, arr_0 or images is read, unless :NAME names another.

A TorchScript file runs code: use one only if you trust those who made it, or ONNX. The network runs in a process of its
own, which on Linux (5.13 or later) cannot write files.

The distance is biased upwards, and more so for fewer images: compare distances of equally many images, usually 50,000
against the training images. Its standard error is the standard deviation over sets resampled from A and B with
replacement. That is accurate if A and B differ clearly, and up to twice too large if they are nearly alike.

On a CPU, Inception takes about 10 images per second and core: 40 minutes for 50,000 images on two cores. With its 2048
features of as many images, each of the K replicates takes 5 to 10 seconds there.
"""


def add(parser: argparse.ArgumentParser) -> None:
    for name in "AB":
        text = "images, or an .npz of statistics; x.npz:NAME selects an array of an .npz"
        parser.add_argument(name.lower(), metavar=name, help=text)
    parser.add_argument(
        "--features",
        metavar="FILE",
        default=SHIPPED_CLASSIFIER,
        help="an ONNX or TorchScript network; TorchScript runs code (default: %(default)s, the bundled classifier)",
    )
    parser.add_argument(
        "--input-size",
        type=int,
        metavar="X",
        help="resize images to X pixels for FILE; 0: do not resize (default: the size an .onnx declares, else 299)",
    )
    parser.add_argument(
        "--scale",
        choices=SCALE_NAMES,
        help="pixel values for FILE: fid is (x - 128) / 128 (default), unit x / 255, signed x / 127.5 - 1, bytes uint8",
    )
    parser.add_argument(
        "--bootstrap",
        type=int,
        default=20,
        metavar="K",
        help="bootstrap replicates for the standard error; 0: no standard error (default: %(default)s)",
    )
    add_seed(parser, "the bootstrap")
    add_batch_size(parser, "images")
    cache = parser.add_mutually_exclusive_group()
    cache.add_argument("--cache", metavar="FOLDER", help="folder of the cache (default: ~/.cache/fastddpm/fid)")
    cache.add_argument("--no-cache", action="store_true", help="neither read nor write the cache")
    parser.add_argument(
        "--json", action="store_true", help="print the distance, its error and what was compared as one JSON object"
    )
    add_device(parser)


def run(args: argparse.Namespace) -> None:
    from fastddpm.evaluate.fid import fid

    result = fid(
        args.a,
        args.b,
        features=args.features,
        input_size=args.input_size,
        scale=args.scale,
        device=args.device,
        batch_size=args.batch_size,
        replicates=args.bootstrap,
        seed=args.seed,
        cache=not args.no_cache if args.cache is None else args.cache,
        progress=not args.quiet,
    )
    if args.json:
        about = {"a": args.a, "b": args.b, "bootstrap": args.bootstrap, "seed": args.seed}
        statistics = [None if path is None else str(path) for path in result.statistics]
        print(json_text(asdict(result) | about | {"statistics": statistics}))
    else:
        print(_fid_text(result, args.a, args.b, args.bootstrap))


def _fid_text(result: "Fid", a: str, b: str, replicates: int) -> str:
    error = "" if result.error is None else f" ± {result.error:.2g} (standard error, {replicates} replicates)"
    lines = [f"Fréchet distance {result.distance:.6g}{error}"]
    for name, path, count, file in zip("AB", (a, b), result.counts, result.statistics, strict=True):
        source = path if count is None else f"{count} images of {path}"
        lines.append(f"{name}: {source}" if file is None else f"{name}: {source}, statistics in {file}")
    network = "" if result.extractor is None else f" of {result.extractor}"
    lines.append(f"features: {result.dimension}{network}")
    lines += [f"note: {note}" for note in result.notes]
    return "\n".join(lines)
