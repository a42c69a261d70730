"""``python -m benchmarks COMMAND``: each command is a module or a package here, imported when it is asked for."""

from __future__ import annotations

import importlib
import sys

from dbmtl_kernels.bench.results import BenchError

# Command -> the module whose ``main(words)`` runs it and gives the exit code; and what it does.
COMMANDS = {
    "claims": ("benchmarks.claims.__main__", "train every method on real data: a verdict on each claim of the paper"),
    "compare": ("benchmarks.compare", "time this tree and another commit in turn; fails beyond an A/A band"),
    "learning_rate": ("benchmarks.learning_rate", "the trunk's gradient over a run: which rate, which clip"),
    "price_list": ("benchmarks.price_list.command", "time and memory over equal weighting, of every method"),
    "scale": ("benchmarks.scale.command", "what a step takes on up to 1,024 GPUs, by arithmetic"),
    "report": ("benchmarks.report", "draw the tables of the pages from benchmarks/results"),
}


def main(words: list[str]) -> int:
    """Run a command; 2 after a mistake that the user can set right."""
    if not words or words[0] not in COMMANDS:
        lines = [f"  {name:14s} {what}" for name, (_, what) in COMMANDS.items()]
        asked = bool(words) and words[0] in ("-h", "--help")
        print(
            "usage: python -m benchmarks COMMAND [--help]", *lines, sep="\n", file=sys.stdout if asked else sys.stderr
        )
        return 0 if asked else 2
    try:
        code: int = importlib.import_module(COMMANDS[words[0]][0]).main(words[1:])
    except BenchError as error:
        print(f"{words[0]}: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name != "tqdm":
            raise
        print(f"{words[0]}: tqdm, which draws progress bars, is missing: pip install tqdm", file=sys.stderr)
        return 2
    return code


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
