"""Command line of the claims."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dbmtl_kernels.bench.results import BenchError

from . import runs
from .methods import MAKE, STL, check
from .settings import SEEDS, SETTINGS, SUITES

OUT = Path(__file__).parents[1] / "results" / "claims.csv"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks claims", description=__doc__)
    parser.add_argument("suite", nargs="?", default="quick", help=f"{', '.join(SUITES)} (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on with the results file")
    parser.add_argument("--settings", nargs="+", metavar="NAME", help=f"instead of the suite's: {', '.join(SETTINGS)}")
    every = ", ".join((STL, *MAKE)).replace("%", "%%")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help=f"instead of the suite's: {every}")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="how many (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=OUT, help="results file (default: %(default)s)")
    data = Path.home() / ".cache" / "dbmtl_kernels"
    parser.add_argument("--data", type=Path, default=data, help="folder of the fetched data (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="generated data, one seed, one rate, few steps")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, or 2 where the trial cannot be run."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    try:
        for what in ("seeds", "jobs"):
            if getattr(args, what) < 1:
                raise BenchError(f"--{what} must be at least 1, got {getattr(args, what)}")
        if args.suite not in SUITES:
            raise BenchError(f"no suite {args.suite!r}: it is one of {', '.join(SUITES)}")
        suite = SUITES[args.suite]
        names = args.settings or list(suite.settings)
        for name in names:
            if name not in SETTINGS:
                raise BenchError(f"no setting {name!r}: it is one of {', '.join(SETTINGS)}")
        chosen = check(args.methods or suite.methods)
        runs.run_all(
            args.out, args.data, names, chosen, args.seeds,
            resume=args.resume, small=args.smoke, jobs=args.jobs, command=" ".join(["python -m benchmarks claims", *argv]),
        )  # fmt: skip
    except BenchError as error:
        print(f"claims: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
