"""The site: what fails its build, by name. `make docs` builds all of it, and `.ci/run` calls that."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="the extra [docs] is not installed")
pytest.importorskip("griffe")
ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tools"))

import mkdocs_hook as hook  # noqa: E402
from mkdocs.commands.build import build  # noqa: E402
from mkdocs.config import load_config  # noqa: E402
from mkdocs.exceptions import Abort, PluginError  # noqa: E402


def test_every_public_name_is_documented_and_on_its_page():
    page = (ROOT / "docs" / "api.md").read_text()
    assert hook.missing(page) == []
    names = [name for name, _ in hook.public()]
    assert {"dbmtl_kernels.DBMTL", "dbmtl_kernels.OnePassDBMTL", "dbmtl_kernels.balance_"} < set(names)
    assert hook.missing(page.replace("::: dbmtl_kernels.DBMTL\n", "")) == ["dbmtl_kernels.DBMTL is not in docs/api.md"]


def test_an_undocumented_name_is_told(tmp_path):
    package = tmp_path / "python" / "dbmtl_kernels"
    package.mkdir(parents=True)
    (package / "other.py").write_text('def documented():\n    """It is."""\n\n\ndef bare(): ...\n')
    (package / "__init__.py").write_text(
        '__all__ = ["Thing", "bare", "documented"]\nfrom .other import bare, documented\n\n\n'
        'class Thing:\n    """Is."""\n\n    def told(self):\n        """It is."""\n\n    def not_told(self): ...\n'
        "    def _hidden(self): ...\n"
    )
    page = "".join(f"::: dbmtl_kernels.{name}\n" for name in ("Thing", "bare"))
    assert hook.missing(page, tmp_path, [""]) == [
        "dbmtl_kernels.Thing.not_told has no docstring",
        "dbmtl_kernels.bare has no docstring",
        "dbmtl_kernels.documented is not in docs/api.md",
    ]


def test_links_out_of_the_docs_lead_into_the_repository():
    page = ROOT / "docs" / "which.md"
    text = "[a](../examples/office.py) [b](forms.md)\n\n```python\nx = y[0](../no.md)\n```\n[c](../README.md#two)\n"
    drawn = hook.outward(page, text, "https://host/owner/name/")
    assert "[a](https://host/owner/name/blob/main/examples/office.py) [b](forms.md)" in drawn
    assert "x = y[0](../no.md)" in drawn
    assert "[c](https://host/owner/name/blob/main/README.md#two)" in drawn
    with pytest.raises(PluginError, match=r"which\.md: a dead link, \.\./no/such\.py"):
        hook.outward(page, "[a](../no/such.py)", "https://host")


def test_links_named_by_a_file_get_its_title():
    text = hook.titled(ROOT / "docs", "[which.md](which.md#which-beta), [here](which.md), [no.md](no.md)")
    assert text == "[Which balancer should I take?](which.md#which-beta), [here](which.md), [no.md](no.md)"


@pytest.mark.parametrize("link", ["none.md", "index.md#no-such-part"])
def test_a_dead_link_fails_the_build_by_name(tmp_path, link, caplog):
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "index.md").write_text(f"# Home\n\n[there]({link})\n")
    options = {"docs_dir": str(docs), "site_dir": str(tmp_path / "site"), "nav": ["index.md"], "plugins": ["search"]}
    config = load_config(str(ROOT / "mkdocs.yml"), hooks=[], extra_css=[], strict=True, **options)
    with pytest.raises(Abort, match="1 warning"):
        build(config)
    assert link in caplog.text
