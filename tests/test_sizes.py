"""The bounds that `make lint` holds files and folders to."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCSTRING = '"""' + "Long.\n" * 300 + '"""\n'


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"python/a.py": "x = 1\n" * 251}, "python/a.py: 251 lines of code, at most 250 allowed"),
        ({"python/a.py": "# Why.\n\n" * 100 + DOCSTRING + "x = 1\n"}, "python/a.py: 502 lines, at most 400 allowed"),
        ({"python/a.py": DOCSTRING + "# Why.\n" * 40 + "x = 1\n" * 40}, ""),
        ({"csrc/cpu/a.h": "\n" * 401}, "csrc/cpu/a.h: 401 lines, at most 400 allowed"),
        ({f"python/room/{i}.py": "" for i in range(11)}, "python/room: 11 modules, at most 10 allowed"),
        ({f"python/room/{i}.py": "" for i in ("__init__", *range(10))}, ""),
    ],
)
def test_what_is_over_a_bound_is_named_with_it(tmp_path, files, said):
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    command = [sys.executable, ROOT / "tools" / "check_sizes.py", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.strip() == said
    assert done.returncode == (1 if said else 0)
