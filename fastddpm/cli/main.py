"""The command line, `fastddpm sample | merge | train | likelihood | fid | verify | info`: parses, calls, prints."""

import argparse
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn, cast

import numpy as np
import torch

from fastddpm import ops
from fastddpm._version import __version__
from fastddpm.core.schedule import (
    BETA_SCHEDULES,
    LEARNED_VARIANCE_TYPES,
    PREDICTION_TYPES,
    SAMPLERS,
    VARIANCE_TYPES,
    Schedule,
)
from fastddpm.evaluate import likelihood
from fastddpm.evaluate.features import SCALES
from fastddpm.evaluate.features import SHIPPED as GARMENTS
from fastddpm.evaluate.fid import fid
from fastddpm.networks.unet2d import UNet2D
from fastddpm.processes.distributed import Ranks, ranks
from fastddpm.sampling import job
from fastddpm.sampling.engine import ENGINES, PRECISIONS
from fastddpm.sampling.sampler import SHIPPED, Sampler, device_and_precision
from fastddpm.storage import datasets, images
from fastddpm.storage.files import atomic, check_writable
from fastddpm.storage.fingerprint import installed
from fastddpm.storage.indices import Indices
from fastddpm.storage.merge import merge
from fastddpm.storage.plots import bound_terms
from fastddpm.train.trainer import TRAINED, TRAINERS, TrainOptions, check_options, train
from fastddpm.verify.ladder import table, verify

_SUFFIXES = {".png": "grid", ".npz": "npz", "": "png"}
_DEFAULT_OUT = {"png": "samples", "grid": "samples.png", "npz": "samples.npz", "webdataset": "samples"}
_PACKAGES = ("triton", "numpy", "safetensors", "huggingface_hub", "diffusers")

_TRAINING = {
    "steps": "optimiser steps in all",
    "batch_size": "images per step, of all processes together",
    "learning_rate": "peak of the learning rate",
    "warmup": "steps until the peak (default: 500, but at most a tenth of --steps)",
    "ema": "decay of the averaged weights, which are what is saved",
    "weight_decay": "of AdamW",
    "grad_clip": "largest norm of the gradient",
    "flip": "mirror half of the images",
    "channels": "of each level of the U-Net; every level but the first halves the image",
    "layers": "residual blocks per level",
    "attention": "levels with self-attention, 0 the finest",
    "groups": "of the group norms",
    "dropout": "in the residual blocks",
    "seed": "of the initial weights and all that is random",
    "save_every": "steps between checkpoints",
    "log_every": "steps between lines of the log",
    "sample_every": "steps between grids of samples",
}

_SAMPLE = """
examples:
  fastddpm sample                                          16 garments by the model in the package -> samples.png
  fastddpm sample google/ddpm-cifar10-32 --num-samples 64  a diffusers checkpoint of the Hugging Face hub
  fastddpm sample runs/mine --sampler ddim --steps 50      a folder; 50 deterministic steps instead of all 1000
  fastddpm sample runs/mine --indices 7,100-120 --out some.npz
  fastddpm sample runs/mine --num-samples 50000 --out samples/ --format webdataset    or png, or npz
  torchrun --nproc-per-node 8 -m fastddpm sample runs/mine --num-samples 50000 --out samples/

Sample i of a seed is the same image whatever else is sampled with it, up to the network's rounding; with
--batch-invariant to the bit. A folder is written shard by shard: after a kill the same command, with as many processes
as there are then, draws what it lacks, and the files end as those of an undisturbed run.
"""
_MERGE = """
examples:
  fastddpm merge samples/ samples.npz                      arr_0 uint8 [N, H, W, C], as evaluators of the FID read it
  fastddpm merge here/ there/ samples.tar                  parts drawn apart, with --indices
"""
_TRAIN = """
examples:
  fastddpm train fashion-mnist.npz --out runs/garments
  fastddpm train photographs/ --out runs/photographs --channels 64,128,256 --attention 1,2 --layers 2 --flip
  fastddpm train animals/ --out runs/animals --class-conditional    a folder of one folder for each class
  torchrun --nproc-per-node 8 -m fastddpm train photographs/ --out runs/photographs

DATA is an .npz with uint8 [N, H, W] or [N, H, W, C], an MNIST-format file (idx, .gz or not), or a folder of images of
one size. The folder --out becomes a diffusers checkpoint, with a log, a loss curve and samples beside it; the same
command again resumes a run. Under torchrun the processes share each batch, with the images and the noise of one.
"""
_LIKELIHOOD = """
examples:
  fastddpm likelihood runs/mine test.npz                         all terms of all images
  fastddpm likelihood fashion-mnist test.npz --num-images 1000 --terms 20 --plot bound.png

Reports a bound on -log2 p(image) in bits per dimension, as the DDPM paper's table does: the rate L_1 + ... + L_T and
the distortion L_0, each with its standard error over the images. DATA is what `fastddpm train` takes, in the same
preparation; of an .npz with x_train and x_test it is x_test. With --terms K only K timesteps of each image are
evaluated, and the bound is unbiased still.
"""
_FID = """
examples:
  fastddpm fid fashion-mnist.npz:x_test samples.npz                 garments, by the classifier in the package
  fastddpm fid cifar10.npz samples/ --features inception.pt         the FID, by the Inception network you have
  fastddpm fid cifar10-stats.npz samples/ --features inception.onnx mean and covariance that somebody has published

A and B are each an .npz, an MNIST-format file, a folder of images or one that `fastddpm sample` wrote; an .npz with mu
and sigma is statistics. Those of images are kept, and where they lie is told: the second time no network is run. Of
an .npz it is x_train, x, arr_0 or images unless :NAME says otherwise.

The distance is biased upwards, the more the fewer the images are: compare figures of equal number, 50,000 against the
training images as is usual. Its error is the standard deviation over sets that are drawn from A and B with replacement:
right where they differ clearly, up to twice too large where they are nearly alike. Of 50,000 images and Inception's
2048 features each of the K takes some 5 to 10 seconds on two cores.
"""
_VERIFY = """
examples:
  fastddpm verify                                          the model in the package: a minute or two on two cores
  fastddpm verify google/ddpm-cifar10-32 --steps 100       a diffusers checkpoint, its trajectory of 100 steps

Noise, update and noising must have the reference's bits; what rounds otherwise may err at most twice as much as plain
torch in the same precision does, both judged by float64. Exit status 1 if anything fails.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0, or 2 after an error, 130 after Ctrl-C and 143 after SIGTERM, each with one line on stderr.

    1 where something that was verified is wrong; 141, as a shell has it, where the reader of the output has left.
    """
    args = _parser().parse_args(arguments)
    try:
        status = args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes again when it ends
        return 141
    except job.Stopped as stop:
        if str(stop):
            print(f"\nfastddpm: {stop}", file=sys.stderr)
        return 128 + stop.number
    except KeyboardInterrupt:
        print("\nfastddpm: interrupted; finished files are whole", file=sys.stderr)
        return 130
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
        hint = "" if args.debug or not kind else " (--debug shows where)"
        print(f"fastddpm: error: {kind}{' '.join(str(error).split())}{hint}", file=sys.stderr)
        return 2
    return status or 0


def _sample(args: argparse.Namespace) -> None:
    if args.batch_invariant and args.batch_size is not None:
        raise ValueError("--batch-size does not apply with --batch-invariant, which fixes it; leave one out")
    out, kind, folder = _destination(args.out, args.format)
    with ranks(args.device) as group:
        with group.agree():
            if not folder:
                _check_for_one_file(args, out, group)
            check_writable(out, folder=folder, make=False)
            before = job.previous(out) if folder and args.precision == "auto" else {}
            sampler = Sampler.from_pretrained(
                args.checkpoint,
                variant=args.variant,
                device=group.device,
                precision=before.get("precision", args.precision),
                engine=args.engine,
                batch_invariant=args.batch_invariant,
            )
        samples = args.num_samples if args.indices is None else args.indices
        how = {name: getattr(args, name) for name in ("seed", "steps", "sampler", "eta", "batch_size", "class_labels")}
        how |= {"noise": not args.no_noise, "progress": not args.quiet}
        if not folder:
            _sample_file(sampler, out, kind, Indices.of(samples), how)
            return
        began = time.monotonic()
        how |= {"format": kind, "shard_size": args.shard_size, "json_log": args.json_log}
        store = job.sample_to(out, sampler, samples, **how)
        if not args.quiet and group.rank == 0:
            print(f"{out}: all {len(store.samples)} samples are done; {time.monotonic() - began:.1f} s this time")


def _check_for_one_file(args: argparse.Namespace, out: Path, group: Ranks) -> None:
    way_out = f"name a folder, as --out {out.stem or 'samples'}/ --format npz"
    if group.size > 1:
        raise ValueError(f"{group.size} processes cannot write one file, {out}; {way_out}")
    for option in ("shard_size", "json_log"):
        if getattr(args, option) is not None:
            raise ValueError(f"--{option.replace('_', '-')} does not apply to one file, {out}; {way_out}")


def _sample_file(sampler: Sampler, out: Path, kind: str, samples: Indices, how: dict[str, Any]) -> None:
    """Draw samples, in memory, into one file: a grid or an npz."""
    picture = sampler.shape[0] in images.CHANNELS
    if not picture and kind != "npz":
        raise ValueError(f"the model's samples have {sampler.shape[0]} channels, no picture has; write --format npz")
    if not samples:
        raise ValueError("no samples were asked for; give --num-samples or --indices")
    labels = how["class_labels"]
    if labels is not None and 0 < len(labels) < len(samples):
        how = how | {"class_labels": np.resize(tuple(labels), len(samples)).tolist()}
    began = time.monotonic()
    x = sampler.sample(samples, output="uint8" if picture else "float", **how)
    seconds = time.monotonic() - began
    save = images.save_grid if kind == "grid" else images.save_npz
    save(x, out)
    if how["progress"]:
        print(f"{out}: {len(x)} samples in {seconds:.1f} s, {len(x) / seconds:.3g} per second")


def _destination(out: str | None, kind: str | None) -> tuple[Path, str, bool]:
    """Where to write, in which format, and whether into a folder; one often follows from the other."""
    if out is None:
        out = _DEFAULT_OUT[kind or "grid"]
    if not out:
        raise ValueError("--out is ''; name a .png, an .npz or a folder")
    suffix = "" if out.endswith(os.sep) or Path(out).is_dir() else Path(out).suffix.lower()
    implied = _SUFFIXES.get(suffix)
    if kind is None and implied is None:
        raise ValueError(f"--out is {out}; name a .png, an .npz or a folder, or say what it is with --format")
    if kind is not None and suffix and implied is not None and implied != kind:
        raise ValueError(f"--format {kind} does not go with --out {out}; leave --format out, or write a {implied}")
    kind = kind or str(implied)
    if kind == "webdataset" and suffix == ".tar":
        way_out = f"name a folder, {Path(out).stem}/, which `fastddpm merge` makes one tar of"
        raise ValueError(f"--format webdataset writes many tars, and --out is {out}; {way_out}")
    return Path(out), kind, kind in ("png", "webdataset") or (kind == "npz" and not suffix)


def _merge(args: argparse.Namespace) -> None:
    shape = merge(args.folders, args.out, progress=not args.quiet)
    if not args.quiet:
        print(f"{args.out}: {shape[0]} samples, each {' x '.join(map(str, shape[1:]))}")


def _train(args: argparse.Namespace) -> None:
    options = TrainOptions(
        **{name: getattr(args, name) for name in (*_TRAINING, "precision", "engine", "init")},
        schedule=Schedule(
            beta_schedule=args.beta_schedule,
            num_train_timesteps=args.timesteps,
            prediction_type=args.prediction,
        ),
    )
    if Path(args.data).is_dir() and Path(args.out).resolve().is_relative_to(Path(args.data).resolve()):
        raise ValueError(f"--out {args.out} is in DATA, {args.data}, whose pictures would grow; name another folder")
    with ranks(args.device) as group:
        speaks = not args.quiet and group.rank == 0
        with group.agree():
            check_options(options, group.device)
            check_writable(args.out, folder=True, make=False)
            pictures = datasets.load_images(args.data, progress=speaks)
            labels = datasets.load_labels(args.data, count=len(pictures)) if args.class_conditional else None
        out = train(pictures, args.out, options, labels=labels, device=group.device, progress=speaks)
    if speaks:
        print(f"{out}: trained for {options.steps} steps; now `fastddpm sample {out}`")


def _likelihood(args: argparse.Namespace) -> None:
    for out, suffix in ((args.out, ".npz"), (args.plot, ".png")):
        if out is not None and Path(out).suffix.lower() != suffix:
            raise ValueError(f"{'--out' if suffix == '.npz' else '--plot'} is {out}; name a {suffix}")
        if out is not None:
            check_writable(out)
    if args.num_images is not None and args.num_images < 1:
        raise ValueError(f"--num-images is {args.num_images}; want a whole number, at least 1")
    shipped = args.checkpoint == SHIPPED and not Path(SHIPPED).exists()
    sampler = Sampler.from_pretrained(
        None if shipped else args.checkpoint,
        variant=args.variant,
        device=args.device,
        precision=args.precision,
        engine=args.engine,
    )
    schedule, config = sampler.schedule, cast(UNet2D, sampler.model).config
    if args.variance_type is not None:
        schedule = sampler.schedule = replace(schedule, variance_type=args.variance_type)
    if args.plot is not None and schedule.num_train_timesteps == 1:
        raise ValueError("--plot does not apply to a model of T = 1, whose bound has no terms over t; leave it out")
    pictures = datasets.load_images(args.data, held_out=True, progress=not args.quiet)
    array = datasets.array_name(args.data, held_out=True)
    labels = args.class_labels
    if labels is None and (config["num_class_embeds"] or config["class_embed_type"]):
        how: dict[str, Any] = {"count": len(pictures), "held_out": True, "classes": config["num_class_embeds"]}
        labels = datasets.load_labels(args.data, **how)[: args.num_images]
    pictures = pictures[: args.num_images]
    began = time.monotonic()
    found = likelihood.bound(
        sampler,
        pictures,
        terms=args.terms,
        seed=args.seed,
        batch_size=args.batch_size,
        class_labels=labels,
        progress=not args.quiet,
    )
    seconds, summary, (t, mean, error) = time.monotonic() - began, found.summary(), found.per_timestep()
    count, terms, T = *found.terms.shape, schedule.num_train_timesteps
    if args.out is not None:
        arrays = {name: found.bits(getattr(found, name)) for name in ("prior", "decoder", "terms")}
        arrays |= {"bits_per_dim": found.per_image, "timesteps": found.timesteps, "weights": found.weights}
        arrays |= {"t": t, "mean": mean, "error": error, "count": found.timesteps.flatten().bincount()[t]}
        with atomic(args.out) as file:
            np.savez(file, **{name: array.numpy() for name, array in arrays.items()})  # type: ignore[arg-type]
    if args.plot is not None:
        ends = {"prior": summary["prior"], "decoder": summary["distortion"], "total": summary["total"]}
        bound_terms(t, mean, error, **ends, num_train_timesteps=T, path=args.plot)
    if args.json:
        about = {"data": args.data, "array": array, "images": count, "terms": terms, "timesteps": T}
        about |= {"seed": args.seed, "seconds": seconds, "variance_type": schedule.variance_type, "unit": "bits/dim"}
        told = {name: {"mean": mean, "error": error} for name, (mean, error) in summary.items()}
        print(json.dumps(_finite(about | told)))
        return
    names = {
        "rate": "rate L_1 + ... + L_T",
        "prior": "  of which L_T",
        "distortion": "distortion L_0",
        "total": "bound",
    }
    of = f" of {array}" if array else ""
    print(f"{count} images{of}, {terms} of {T - 1} terms each, {schedule.variance_type}, {seconds:.1f} s")
    print(f"{'':<22} bits/dim   standard error")
    for name, title in names.items():
        print(f"{title:<22} {summary[name][0]:8.5f}   {summary[name][1]:.2g}")


def _fid(args: argparse.Namespace) -> None:
    found = fid(
        args.a,
        args.b,
        features=args.features,
        input_size=args.input_size,
        scale=args.scale,
        device=args.device,
        batch_size=args.batch_size,
        replicates=args.bootstrap,
        seed=args.seed,
        cache=False if args.no_cache else args.cache or True,
        progress=not args.quiet,
    )
    if args.json:
        about = {"a": args.a, "b": args.b, "bootstrap": args.bootstrap, "seed": args.seed}
        print(json.dumps(asdict(found) | about, default=str))
        return
    error = "" if found.error is None else f" ± {found.error:.2g}, the standard error by {args.bootstrap} replicates"
    print(f"Fréchet distance {found.distance:.6g}{error}")
    for name, path, count, kept in zip("AB", (args.a, args.b), found.counts, found.statistics, strict=True):
        images = "" if count is None else f"{count} images of "
        print(f"{name}: {images}{path}{'' if kept is None else f', statistics in {kept}'}")
    print(f"features: {found.dimension}{'' if found.extractor is None else f' of {found.extractor}'}")
    for note in found.notes:
        print(f"note: {note}")


def _verify(args: argparse.Namespace) -> int:
    records = verify(
        args.checkpoint,
        variant=args.variant,
        device=args.device,
        steps=args.steps,
        damage=args.damage,
        progress=not args.quiet,
    )
    passed = all(record.verdict != "FAIL" for record in records)
    if args.json:
        listed = [asdict(record) | {"verdict": record.verdict} for record in records]
        print(json.dumps({"passed": passed, "records": _finite(listed)}))
    else:
        print(table(records))
    return 0 if passed else 1


def _finite(value: Any) -> Any:
    """The same with NaN and infinities as text, for which JSON has no numbers."""
    if isinstance(value, dict):
        return {key: _finite(content) for key, content in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(content) for content in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _info(args: argparse.Namespace) -> None:
    facts = _facts()
    if args.json:
        compiled = _report(args.cc, "--json")
        print(json.dumps({**facts, "kernels": compiled and json.loads(compiled)}, indent=2))
        return
    for group, content in facts.items():
        for name, value in content.items():
            print(f"{group:<9} {name:<16} {value}")
    print("\n" + (_report(args.cc) or "no kernels: Triton is not installed, torch computes the same bits"))


def _facts() -> dict[str, dict[str, Any]]:
    """What decides how fastddpm runs here."""
    device, precision = device_and_precision(None, "auto")
    machine = {
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "bf16": torch.cpu._is_avx512_bf16_supported(),
    }
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        machine[f"cuda:{i}"] = f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"
    versions: dict[str, str | None] = {
        "fastddpm": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    versions |= {name: installed(name) for name in _PACKAGES}
    default = {"device": device.type, "precision": precision, "backend": ops.backend(device)}
    return {"version": versions, "machine": machine, "default": default}


def _report(capabilities: Sequence[int], *options: str) -> str | None:
    """What each kernel compiles to, from a process of its own: this one may run kernels interpreted, or not at all."""
    if find_spec("triton") is None:
        return None
    gpus = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    wanted = capabilities or sorted({10 * major + minor for major, minor in gpus if major >= 8})
    run = [sys.executable, "-m", "fastddpm.kernels.report", *options, *(["--cc", *map(str, wanted)] if wanted else [])]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(run, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        reasons = re.findall(r"^[\w.]+: .+", done.stderr, re.MULTILINE)
        raise RuntimeError(f"the kernels' report failed: {' '.join(reasons[-1:])}")
    return done.stdout.rstrip()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"fastddpm: error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="fastddpm", description="Exact DDPM sampling, fast. Start with: fastddpm sample")
    parser.add_argument("--version", action="version", version=f"fastddpm {__version__}")
    commands = parser.add_subparsers(
        required=True, metavar="sample | merge | train | likelihood | fid | verify | info", title="commands"
    )

    def command(name: str, run: Any, summary: str, epilog: str | None = None) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(run=run)
        added.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return added

    _add_sample(command("sample", _sample, "draw images from a trained model", _SAMPLE))
    _add_merge(command("merge", _merge, "join the samples of finished folders in one file", _MERGE))
    _add_train(command("train", _train, "train a model on images (Algorithm 1 of the DDPM paper)", _TRAIN))
    _add_likelihood(command("likelihood", _likelihood, "the variational bound of images, in bits/dim", _LIKELIHOOD))
    _add_fid(command("fid", _fid, "the Fréchet distance of two sets of images", _FID))
    _add_verify(command("verify", _verify, "prove that this machine computes what the reference does", _VERIFY))
    info = command("info", _info, "versions, devices, and what each kernel compiles to")
    info.add_argument(
        "--cc",
        type=_numbers,
        default=(),
        metavar="I,J",
        help="compute capabilities to compile for (default: the GPU's; 80,90,100,120)",
    )
    info.add_argument("--json", action="store_true", help="the same as one JSON object")
    return parser


def _add_sample(add: argparse.ArgumentParser) -> None:
    _add_checkpoint(add)
    which = add.add_mutually_exclusive_group()
    which.add_argument("--num-samples", type=int, default=16, metavar="N", help="samples 0..N-1 (default: %(default)s)")
    which.add_argument("--indices", type=_indices, metavar="I,J-K", help="these samples instead, such as 5,7,100-120")
    add.add_argument("--seed", type=int, default=0, help="0 <= seed < 2^64 (default: %(default)s)")
    add.add_argument("--steps", type=int, metavar="S", help="visit S of the T training timesteps (default: all)")
    add.add_argument(
        "--sampler", choices=SAMPLERS, default="ddpm", help="ddpm is the paper's (default), ddim skips well"
    )
    add.add_argument("--eta", type=float, default=0.0, help="noise of ddim, 0 is deterministic (default: %(default)s)")
    add.add_argument("--no-noise", action="store_true", help="switch sigma_t z off: each step takes its mean")
    add.add_argument(
        "--class-labels",
        type=_indices,
        metavar="L,M-N",
        help="for a class-conditional model: one per sample, or fewer, such as 0-9, which are repeated",
    )
    add.add_argument("--out", metavar="PATH", help="x.png: a grid; x.npz; or a folder (default: samples.png)")
    add.add_argument(
        "--format", choices=tuple(_DEFAULT_OUT), help="what to write, where --out does not tell (a folder: png)"
    )
    add.add_argument(
        "--shard-size", type=int, metavar="K", help="samples of a folder kept at a time (default: a batch)"
    )
    add.add_argument("--json-log", metavar="FILE", help="add a JSON line on the progress of a folder every ten seconds")
    add.add_argument("--batch-size", type=int, metavar="B", help="samples computed together (default: by the device)")
    add.add_argument(
        "--batch-invariant", action="store_true", help="sample i has the same bits whatever is sampled with it"
    )
    add.add_argument(
        "--engine", choices=("auto", *ENGINES), default="auto", help="how a step is run (default: auto, by the device)"
    )
    _add_machine(add, ("auto", *PRECISIONS))


def _add_merge(add: argparse.ArgumentParser) -> None:
    add.add_argument("folders", nargs="+", metavar="FOLDER", help="that `fastddpm sample` wrote, in any format")
    add.add_argument("out", metavar="OUT", help="x.npz (arr_0, and arr_1 of labelled samples) or x.tar (webdataset)")
    add.add_argument("--quiet", action="store_true", help="no progress bar, nothing but results")


def _add_train(add: argparse.ArgumentParser) -> None:
    add.add_argument("data", metavar="DATA", help="an .npz, an MNIST-format file or a folder of images")
    add.add_argument(
        "--out", required=True, metavar="FOLDER", help="where the checkpoint goes, or an unfinished run is"
    )
    defaults = TrainOptions()
    for name, text in _TRAINING.items():
        default, flag = getattr(defaults, name), "--" + name.replace("_", "-")
        if isinstance(default, bool):
            add.add_argument(flag, action="store_true", help=text)
        elif isinstance(default, tuple):
            shown = ",".join(map(str, default))
            add.add_argument(flag, type=_numbers, default=default, metavar="I,J", help=f"{text} (default: {shown})")
        elif default is None:
            add.add_argument(flag, type=int, metavar="X", help=text)
        else:
            add.add_argument(
                flag, type=type(default), default=default, metavar="X", help=f"{text} (default: {default})"
            )
    schedule = defaults.schedule
    kind, T = schedule.beta_schedule, schedule.num_train_timesteps
    add.add_argument(
        "--beta-schedule", choices=BETA_SCHEDULES, default=kind, help="the noise schedule (default: %(default)s)"
    )
    add.add_argument("--timesteps", type=int, default=T, metavar="T", help="of the schedule (default: %(default)s)")
    add.add_argument(
        "--prediction",
        choices=PREDICTION_TYPES,
        default=schedule.prediction_type,
        help="what the network learns to predict (default: %(default)s)",
    )
    add.add_argument("--class-conditional", action="store_true", help="learn the classes, too, that come with DATA")
    add.add_argument(
        "--init", metavar="CHECKPOINT", help="start from its weights; layout and schedule are its own, too"
    )
    add.add_argument(
        "--engine", choices=TRAINERS, default="auto", help="how the network is run (default: auto, by the device)"
    )
    _add_machine(add, TRAINED, "that of the run that is resumed, else by the device")


def _add_likelihood(add: argparse.ArgumentParser) -> None:
    text = f"folder or hub id of a diffusers checkpoint; {SHIPPED} is the model in the package"
    add.add_argument("checkpoint", metavar="CHECKPOINT", help=text)
    add.add_argument("data", metavar="DATA", help="an .npz, an MNIST-format file or a folder of images")
    add.add_argument("--variant", metavar="NAME", help="of the weights, such as fp16")
    add.add_argument("--num-images", type=int, metavar="N", help="the first N of DATA (default: all)")
    add.add_argument("--terms", type=int, metavar="K", help="timesteps evaluated of each image (default: all T - 1)")
    add.add_argument("--seed", type=int, default=0, help="0 <= seed < 2^64 (default: %(default)s)")
    add.add_argument("--batch-size", type=int, metavar="B", help="terms computed together (default: by the device)")
    kinds = (*VARIANCE_TYPES, *LEARNED_VARIANCE_TYPES)
    add.add_argument("--variance-type", choices=kinds, help="of the reverse process (default: the checkpoint's)")
    add.add_argument(
        "--class-labels",
        type=_numbers,
        metavar="L,M",
        help="one per image, for a class-conditional model (default: those that come with DATA)",
    )
    add.add_argument("--out", metavar="X.npz", help="write all terms, by image and by timestep, in bits/dim")
    add.add_argument("--plot", metavar="X.png", help="draw the terms over t")
    add.add_argument("--json", action="store_true", help="the bound and its parts as one JSON object")
    add.add_argument(
        "--engine", choices=("auto", *ENGINES), default="auto", help="how the network is run (default: auto)"
    )
    _add_machine(add, ("auto", *PRECISIONS))


def _add_fid(add: argparse.ArgumentParser) -> None:
    for name in "AB":
        text = "images, or an .npz of statistics; x.npz:NAME is another array of an .npz"
        add.add_argument(name.lower(), metavar=name, help=text)
    add.add_argument(
        "--features",
        metavar="FILE",
        default=GARMENTS,
        help="a TorchScript or ONNX network (default: %(default)s, the classifier in the package)",
    )
    add.add_argument(
        "--input-size",
        type=int,
        metavar="X",
        help="pixels that FILE takes images of, 0: as they are (default: what an .onnx says, else 299)",
    )
    add.add_argument(
        "--scale",
        choices=tuple(SCALES),
        help="of pixels for FILE: fid is (x - 128) / 128 (default), unit x / 255, signed x / 127.5 - 1, bytes uint8",
    )
    add.add_argument("--bootstrap", type=int, default=20, metavar="K", help="replicates, or 0 (default: %(default)s)")
    add.add_argument("--seed", type=int, default=0, help="of the bootstrap, 0 <= seed < 2^64 (default: %(default)s)")
    add.add_argument("--batch-size", type=int, metavar="B", help="images computed together (default: by the device)")
    keep = add.add_mutually_exclusive_group()
    keep.add_argument("--cache", metavar="FOLDER", help="where statistics are kept (default: ~/.cache/fastddpm/fid)")
    keep.add_argument("--no-cache", action="store_true", help="keep none, and use none that are kept")
    add.add_argument("--json", action="store_true", help="distance, error and what they are of as one JSON object")
    _add_machine(add)


def _add_verify(add: argparse.ArgumentParser) -> None:
    _add_checkpoint(add)
    add.add_argument("--steps", type=int, metavar="S", help="of the trajectory (default: all T)")
    add.add_argument("--json", action="store_true", help="the comparisons as one JSON object")
    add.add_argument("--damage", metavar="RUNG", help=argparse.SUPPRESS)
    _add_machine(add)


def _add_checkpoint(add: argparse.ArgumentParser) -> None:
    add.add_argument(
        "checkpoint", nargs="?", help=f"folder or hub id of a diffusers checkpoint (default: {SHIPPED}, in the package)"
    )
    add.add_argument("--variant", metavar="NAME", help="of the weights, such as fp16")


def _add_machine(add: argparse.ArgumentParser, precisions: Sequence[str] = (), auto: str = "by the device") -> None:
    if precisions:
        text = f"of the network (default: auto, {auto})"
        add.add_argument("--precision", choices=precisions, default="auto", help=text)
    add.add_argument("--device", help="cpu, cuda or cuda:N (default: the GPU if there is one)")
    add.add_argument("--quiet", action="store_true", help="no progress bar, nothing but results")


def _indices(text: str) -> Indices:
    try:
        return Indices.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _numbers(text: str) -> tuple[int, ...]:
    """5,7,100-103 -> (5, 7, 100, 101, 102, 103)."""
    return tuple(_indices(text))
