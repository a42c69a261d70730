"""Bounds on sizes: no file over 400 lines; in python/, no module over 250 lines of code, no folder over ten modules.

A line of code holds something other than a comment or a docstring. ``__init__.py`` is not counted as a module.
``python tools/check_sizes.py [ROOT]`` prints what is over a bound, and exits with 1 if anything is.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections import Counter
from pathlib import Path

MOST_LINES, MOST_CODE, MOST_MODULES = 400, 250, 10
FOLDERS = ("python", "csrc", "tests", "benchmarks", "examples", "tools")
SUFFIXES = (".py", ".sh", ".h", ".cuh", ".cpp", ".cu")
NO_CODE = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


def lines_of_code(source: str) -> int:
    """Lines that hold code."""
    found: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NO_CODE:
            found.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        if documented and ast.get_docstring(node, clean=False) is not None:
            found.difference_update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(found)


def violations(root: Path) -> list[str]:
    """A line for whatever is over a bound, with its size and the bound."""
    files = [p for folder in FOLDERS for p in sorted((root / folder).rglob("*")) if p.suffix in SUFFIXES]
    modules = [p for p in files if p.is_relative_to(root / "python") and p.suffix == ".py"]
    counts = [(path, len(path.read_text().splitlines()), MOST_LINES, "lines") for path in files]
    counts += [(path, lines_of_code(path.read_text()), MOST_CODE, "lines of code") for path in modules]
    folders = Counter(path.parent for path in modules if path.name != "__init__.py")
    counts += [(folder, count, MOST_MODULES, "modules") for folder, count in folders.items()]
    return [
        f"{path.relative_to(root)}: {count} {what}, at most {most} allowed"
        for path, count, most, what in counts
        if count > most
    ]


if __name__ == "__main__":
    found = violations(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1])
    print(*found, sep="\n", end="\n" if found else "")
    sys.exit(1 if found else 0)
