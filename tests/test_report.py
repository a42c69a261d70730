"""Pages and the rows that their tables are drawn from."""

import re

import pytest
import report
from dbmtl_kernels.bench import results
from dbmtl_kernels.bench.results import BenchError, Row

PAGES = report.wanted()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(report.ROOT)))
def test_a_page_agrees_with_its_rows(page):
    assert page.read_text() == PAGES[page], f"{page.name} disagrees with benchmarks/results: make report"


def test_every_table_is_in_a_page_and_every_file_of_rows_is_of_the_schema():
    shown = {name for page in report.pages() for _, name, *_ in report.MARKED.findall(page.read_text())}
    assert shown == set(report.TABLES)
    for table in report.TABLES.values():
        for name in table.results:
            assert results.read(report.RESULTS / name)


def test_no_row_tells_a_place_of_somebodys_machine():
    files = [*report.RESULTS.iterdir()]
    found = [(file.name, *re.findall(r"(?<![\w.])/(?:[\w.-]+/)+[\w.-]*", file.read_text())[:1]) for file in files]
    assert files
    assert [each for each in found if len(each) > 1] == []


@pytest.fixture
def page(tmp_path, monkeypatch):
    """A page with one table, drawn from rows of its own."""
    results.append(tmp_path / "r.csv", [Row("b", "op", "ours", p50=2.0), Row("b", "op", "ours", p50=1.5)])
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "TABLES", {"it": report.Table(("r.csv",), "drawn:it")})
    last = lambda rows: report.grid(["who", "ms"], [[row.contender, row.p50] for row in report.latest(rows)])  # noqa: E731
    monkeypatch.setattr(report, "function", lambda name: {"drawn:it": last}[name])
    path = tmp_path / "README.md"
    path.write_text("before\n<!-- rows: it -->\nold\n<!-- /rows -->\nafter\n")
    monkeypatch.setattr(report, "wanted", lambda: {path: report.redrawn(path)})
    return path


def test_a_page_that_disagrees_is_told_and_drawn_anew(page, capsys):
    before = page.read_text()
    assert report.main(["--check"]) == 1
    assert page.read_text() == before
    assert "README.md: disagrees with its rows" in capsys.readouterr().out
    assert report.main([]) == 0
    table = "| who | ms |\n| --- | --- |\n| ours | 1.5 |"  # the last row of its kind
    assert page.read_text() == f"before\n<!-- rows: it -->\n{table}\n<!-- /rows -->\nafter\n"
    assert report.main(["--check"]) == 0


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("rows: it", "rows: that", "no table 'that': there are it"),
        ("<!-- /rows -->", "", "1 tables begin and 0 end"),
        ("old", "<!-- rows: it -->", "2 tables begin and 1 end"),
    ],
)
def test_a_marker_that_means_nothing_is_told(page, old, new, said):
    page.write_text(page.read_text().replace(old, new))
    with pytest.raises(BenchError, match=said):
        report.main([])


def test_results_that_cannot_be_read_are_told(page):
    (report.RESULTS / "r.csv").write_text("contender,ms\n")
    with pytest.raises(BenchError, match="of another schema"):
        report.main([])
