"""The snippets of README.md and the guides run as they stand, one after another; scripts with torchrun."""

import contextlib
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from ranks import torchrun

ROOT = Path(__file__).parent.parent
PAGES = [
    "README.md",
    *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md") if "```python" in page.read_text()),
]


class WandbRun(contextlib.AbstractContextManager):
    """Takes what `wandb.Run.log` takes: a dict of numbers and pictures."""

    def log(self, row):
        assert row
        for name, value in row.items():
            assert isinstance(name, str)
            assert isinstance(value, (float, Picture)), (name, value)

    def __exit__(self, *error):
        pass


class Picture:
    """Takes a file, as `wandb.Image` does."""

    def __init__(self, path):
        assert Path(path).read_bytes().startswith(b"\x89PNG")


WANDB = SimpleNamespace(init=lambda project, mode: WandbRun(), Image=Picture)


def snippets_of(page):
    """The plain ones, and scripts by name: those that begin with a comment that names a file."""
    snippets = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), flags=re.M | re.S)
    scripts = {found.group(1): text for text in snippets if (found := re.match(r"# (\w+\.py)\b", text))}
    return [text for text in snippets if text not in scripts.values()], scripts


@pytest.mark.parametrize("page", PAGES)
def test_snippets(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    snippets, scripts = snippets_of(page)
    assert snippets
    for name, text in scripts.items():
        (tmp_path / name).write_text(text)
    names: dict[str, object] = {}
    try:
        for snippet in snippets:
            if "import wandb" in snippet:  # not before: trainers ask whether it is there
                monkeypatch.setitem(sys.modules, "wandb", WANDB)
            exec(compile(snippet, page, "exec"), names)
    finally:
        sys.modules.pop("model", None)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train_ddp.py", "train_fsdp.py", "checkpoint.py"])
def test_scripts(name, tmp_path):
    _, scripts = snippets_of("docs/training.md")
    for script, text in scripts.items():
        (tmp_path / script).write_text(text)
    torchrun(2, name, cwd=tmp_path)


def test_links_lead_somewhere():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "CONTRIBUTING.md"):
        prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", prose):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
