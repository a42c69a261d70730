"""What the site needs beside mkdocs: links out of docs/, and that nothing public is left out. A hook of mkdocs.yml."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import griffe
from mkdocs.exceptions import PluginError

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"(^```.*?^```)", re.M | re.S)
LINK = re.compile(r"\]\((\.\./[^)#\s]+)(#[^)\s]*)?\)")
NAMED = re.compile(r"\[(\w+\.md)\]\((\w+\.md)(#[^)\s]*)?\)")
PUBLIC = ("", "monitor.Monitor", "integrations.accelerate", "integrations.libmtl", "integrations.lightning",
          "integrations.torchjd", "integrations.transformers")  # fmt: skip


def outward(page: Path, text: str, repository: str) -> str:
    """The page with links to files beyond docs/ as addresses in the repository.

    Raises:
        PluginError: there is no such file.
    """

    def address(found: re.Match[str]) -> str:
        target = (page.parent / found[1]).resolve()
        if not target.exists():
            raise PluginError(f"{page.name}: a dead link, {found[1]}")
        return f"]({repository.rstrip('/')}/blob/main/{target.relative_to(ROOT).as_posix()}{found[2] or ''})"

    parts = FENCE.split(text)
    return "".join(part if index % 2 else LINK.sub(address, part) for index, part in enumerate(parts))


def titled(folder: Path, text: str) -> str:
    """The page with links under titles of pages, where the file has the name of a file: [forms.md](forms.md)."""

    def title(found: re.Match[str]) -> str:
        target = folder / found[2]
        heading = re.search(r"^# (.+)$", target.read_text(), re.M) if found[1] == found[2] and target.exists() else None
        return f"[{heading[1] if heading else found[1]}]({found[2]}{found[3] or ''})"

    return NAMED.sub(title, text)


def public(root: Path = ROOT, names: Sequence[str] = PUBLIC) -> Iterator[tuple[str, Any]]:
    """By dotted name what a user may import, read off the source: what each __all__ has, and a class by its name."""
    package = griffe.load("dbmtl_kernels", search_paths=[root / "python"], resolve_aliases=True)
    for name in names:
        found = package[name] if name else package
        for export in found.exports or [] if found.is_module else [None]:
            each = found if export is None else found[str(export)]
            yield each.path, each.final_target if each.is_alias else each


def missing(page: str, root: Path = ROOT, names: Sequence[str] = PUBLIC) -> list[str]:
    """Public names that the page of the API leaves out, or that have no docstring; so too of their own methods."""
    found = []
    for name, value in public(root, names):
        if not re.search(rf"^::: {re.escape(name)}$", page, re.M):
            found.append(f"{name} is not in docs/api.md")
        members = value.members.items() if value.is_class else ()
        own = {f"{name}.{key}": each for key, each in members if not key.startswith("_")}
        for full, each in ({name: value} | own).items():
            if not each.is_alias and (each.is_function or each.is_class or "property" in each.labels or full == name):
                found += [] if each.docstring else [f"{full} has no docstring"]
    return found


# --- mkdocs calls these ----------------------------------------------------------------------------------------------


def on_pre_build(config: Any) -> None:
    """Before anything is drawn."""
    found = missing((ROOT / "docs" / "api.md").read_text())
    if found:
        raise PluginError("; ".join(found))


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links of one page."""
    here = Path(page.file.abs_src_path)
    return titled(here.parent, outward(here, markdown, config.repo_url))
