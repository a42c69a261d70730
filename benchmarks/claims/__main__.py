"""The paper's claims on real data.

python -m benchmarks claims --resume --jobs 2    the quick trial: trains what the rows lack, measures, prints
python -m benchmarks claims full --resume        all molecules, more pairs of digits, more rates, more steps
python -m benchmarks claims graph --resume       QM9's message-passing network, on a GPU
python -m benchmarks claims forms --resume       one pass and one row against DB-MTL (docs/forms.md)
python -m benchmarks claims show                 prints the tables
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from dbmtl_kernels.bench.results import BenchError, read, typed

from . import pages, runs
from .methods import MAKE, STL, check
from .settings import SEEDS, SETTINGS, SUITES

OUT = Path(__file__).parents[1] / "results" / "claims.csv"
SHOW = "show"


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks claims", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suite", nargs="?", default="quick", help=f"{', '.join(SUITES)}, {SHOW} (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on with the results file")
    parser.add_argument("--settings", nargs="+", metavar="NAME", help=f"instead of the suite's: {', '.join(SETTINGS)}")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help=f"instead of all: {', '.join((STL, *MAKE))}")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="how many (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=OUT, help="results file (default: %(default)s)")
    data = Path.home() / ".cache" / "dbmtl_kernels"
    parser.add_argument("--data", type=Path, default=data, help="folder of the fetched data (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="generated data, one seed, one rate, few steps")
    return parser.parse_args(argv)


def train(args: argparse.Namespace, command: str) -> None:
    """Train and measure what the results file lacks.

    Raises:
        BenchError: an argument, data or the results file, before anything is trained.
    """
    suite = SUITES[args.suite]
    names = args.settings or list(suite.settings)
    for name in names:
        if name not in SETTINGS:
            raise BenchError(f"no setting {name!r}: it is one of {', '.join(SETTINGS)}")
    chosen = check(args.methods or suite.methods)
    runs.run_all(
        args.out, args.data, names, chosen, args.seeds,
        resume=args.resume, small=args.smoke, jobs=args.jobs, command=command,
    )  # fmt: skip
    if args.suite != "forms":
        torch.set_num_threads(1)
        runs.measure_all(args.out, args.data, names, chosen, small=args.smoke, command=command)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, 2 where the trial cannot be run, or 130 after an interrupt."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    try:
        for what in ("seeds", "jobs"):
            if getattr(args, what) < 1:
                raise BenchError(f"--{what} must be at least 1, got {getattr(args, what)}")
        if args.suite not in (*SUITES, SHOW):
            raise BenchError(f"no suite {args.suite!r}: it is one of {', '.join((*SUITES, SHOW))}")
        if args.suite != SHOW:
            train(args, typed("python -m benchmarks claims", *argv))
        rows = read(args.out)
        how = {"seeds": 1 if args.smoke else args.seeds, "small": args.smoke}
        for table in pages.FORM_TABLES if args.suite == "forms" else pages.TABLES:
            print((table.__doc__ or "").splitlines()[0], table(rows, **how), sep="\n\n", end="\n\n")
    except BenchError as error:
        print(f"claims: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"claims: interrupted; what is complete is in {args.out}, and --resume goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
