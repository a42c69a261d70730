"""Command line of the trial."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import report, trial
from .errors import TrialError
from .methods import EVERY_METHOD, EXACT, METHODS
from .settings import SEEDS, SETTINGS

OUT = Path(__file__).parents[1] / "results" / "quality.csv"


def known(names: list[str], table: dict[str, object], what: str) -> list[str]:
    """The names.

    Raises:
        TrialError: one is not in the table.
    """
    for name in names:
        if name not in table:
            raise TrialError(f"no {what} {name!r}: it is one of {', '.join(map(repr, table))}")
    return names


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train what the results file lacks")
    show = commands.add_parser("report", help="print the tables")
    for command in (run, show):
        command.add_argument("--out", type=Path, default=OUT, help="results file (default: %(default)s)")
        command.add_argument("--seeds", type=int, default=SEEDS, help="how many (default: %(default)s)")
        command.add_argument("--smoke", action="store_true", help="generated data, one seed, one rate, few steps")
    show.add_argument("--reference", default=EXACT, metavar="METHOD", help="compared with (default: %(default)s)")
    run.add_argument("--resume", action="store_true", help="go on with the results file")
    run.add_argument("--settings", nargs="+", default=list(SETTINGS), metavar="NAME", help=", ".join(SETTINGS))
    run.add_argument("--methods", nargs="+", default=list(METHODS), metavar="NAME", help=", ".join(EVERY_METHOD))
    run.add_argument("--jobs", type=int, default=1, help="processes, of one thread each (default: %(default)s)")
    data = Path.home() / ".cache" / "dbmtl_kernels"
    run.add_argument("--data", type=Path, default=data, help="folder of the fetched data (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, or 2 where the trial cannot be run."""
    args = parse(argv)
    try:
        if args.seeds < 1:
            raise TrialError(f"--seeds must be at least 1, got {args.seeds}")
        if args.command == "report":
            (reference,) = known([args.reference], dict(EVERY_METHOD), "method")
            report.print_tables(args.out, args.seeds, args.smoke, reference)
            return 0
        settings = known(args.settings, dict(SETTINGS), "setting")
        methods = known(args.methods, dict(EVERY_METHOD), "method")
        if args.jobs < 1:
            raise TrialError(f"--jobs must be at least 1, got {args.jobs}")
        trial.run_all(
            args.out, args.data, settings, methods, args.seeds,
            resume=args.resume, small=args.smoke, jobs=args.jobs,
        )  # fmt: skip
    except TrialError as error:
        print(f"{Path(__file__).parent.name}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
