"""`fastddpm merge`: join the samples of finished folders in one file."""

import argparse

from fastddpm.cli.options import add_quiet

SUMMARY = "join the samples of finished folders in one file"
EPILOG = """
examples:
  fastddpm merge samples/ samples.npz        arr_0 is uint8 [N, H, W, C], as FID tools read it
  fastddpm merge here/ there/ samples.tar    two parts of one job, drawn separately with --indices
"""


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folders", nargs="+", metavar="FOLDER", help="a folder written by `fastddpm sample`, in any format"
    )
    parser.add_argument(
        "out", metavar="OUT", help="an .npz (arr_0, and arr_1 if the samples have labels) or a .tar (webdataset)"
    )
    add_quiet(parser)


def run(args: argparse.Namespace) -> None:
    from fastddpm.storage.merge import merge

    shape = merge(args.folders, args.out, progress=not args.quiet)
    if not args.quiet:
        print(f"{args.out}: {shape[0]} samples, each {' x '.join(map(str, shape[1:]))}")
