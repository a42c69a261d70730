"""This tree against another one."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from dbmtl_kernels.bench import results
from dbmtl_kernels.bench.results import BenchError

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))

from benchmarks import __main__ as command  # noqa: E402
from benchmarks import compare  # noqa: E402


def judged(head, again, base):
    (row,) = compare.judge({"head": {"op": head}, "head, again": {"op": again}, "base": {"op": base}})
    return row


def test_the_verdict_is_beyond_the_band_of_this_run():
    steady, noisy = [1.0, 1.001, 0.999] * 5, [1.0, 1.5, 0.8, 1.4, 0.9] * 3
    assert judged(steady, steady, [0.9] * 15).detail["verdict"] == "slower"
    assert judged(steady, steady, [1.1] * 15).detail["verdict"] == "faster"
    assert judged(steady, steady, [0.99] * 15).detail["verdict"] == "within the band"
    assert judged(noisy, noisy[::-1], [0.9] * 15).detail["verdict"] == "within the band"
    row = judged(steady, steady, [0.5] * 15)
    assert (row.p50, row.ratio, row.over, row.detail["base_ms"]) == (1e3, 2.0, "base", 500.0)
    assert compare.band(steady, steady) == compare.LEAST
    assert compare.band(noisy, [2 * t for t in noisy]) == pytest.approx(2.0)
    # One process in three is slower by a third for as long as it lives: of two trees that are the same.
    lucky, less = [1.0, 1.3, 1.0, 1.0, 1.3, 1.0, 1.0], [1.3, 1.0, 1.0, 1.3, 1.0, 1.0, 1.3]
    assert judged(lucky, less, [1.0, 1.0, 1.3, 1.0, 1.0, 1.3, 1.0]).detail["verdict"] == "within the band"


@pytest.mark.parametrize(("seconds", "code"), [(0.5, 1), (2.0, 0), (1.0, 0)], ids=["slower", "faster", "the same"])
def test_the_exit_code(tmp_path, monkeypatch, seconds, code):
    times = {"head": {"op": [1.0] * 5}, "head, again": {"op": [1.0] * 5}, "base": {"op": [seconds] * 5}}
    monkeypatch.setattr(compare, "repeated", lambda *given: times)
    out = tmp_path / "out.csv"
    assert command.main(["compare", str(ROOT), "--case", "tiny", "--out", str(out)]) == code
    assert [row.ratio for row in results.read(out)] == [1 / seconds]


@pytest.mark.slow
def test_trees_are_measured_in_turn_each_with_its_own_package(tmp_path):
    """The base sleeps in `balance_`: whoever measured one package twice would not see it."""
    other = tmp_path / "base"
    shutil.copytree(ROOT / "python", other / "python", ignore=shutil.ignore_patterns("__pycache__"))
    functional = other / "python" / "dbmtl_kernels" / "functional.py"
    slow = "    __import__('time').sleep(0.05)\n    scale = check_scale(scale)\n"
    assert functional.read_text().count("    scale = check_scale(scale)\n") == 1
    functional.write_text(functional.read_text().replace("    scale = check_scale(scale)\n", slow))
    trees = {"head": ROOT, "base": compare.tree_of(str(other)), "head, again": ROOT}
    times = compare.measure("tiny", trees, rounds=2, warmup=1)
    counts = [(name, what, len(found)) for name, calls in times.items() for what, found in calls.items()]
    assert counts == [(name, what, 2) for name in trees for what in ("balance_ K=2 P=10", "step of 20 parameters")]
    assert min(times["base"]["balance_ K=2 P=10"]) >= 0.05
    medians = compare.repeated("tiny", {"head": ROOT}, restarts=2, rounds=1)
    assert [len(found) for found in medians["head"].values()] == [2, 2]


@pytest.mark.parametrize(
    ("base", "said"),
    [("no-such-revision", "neither a folder nor a git revision"), ("{}", "it has no python/dbmtl_kernels")],
)
def test_a_base_that_is_none_is_told(tmp_path, capsys, base, said):
    assert command.main(["compare", base.format(tmp_path)]) == 2
    assert said in capsys.readouterr().err


SETUP = """
from pathlib import Path
log = Path("builds")
log.write_text(log.read_text() + "built " if log.exists() else "built ")
assert not Path("broken").exists(), "no compiler"
"""


def test_a_revision_is_checked_out_and_built_once(tmp_path, monkeypatch):
    repo = tmp_path / "repo"
    (repo / "python" / "dbmtl_kernels").mkdir(parents=True)
    (repo / "setup.py").write_text(SETUP)
    git = ["git", "-C", str(repo), "-c", "user.name=a", "-c", "user.email=a@b.c"]

    def commit(name, text):
        (repo / name).write_text(text)
        for words in (["add", "-A"], ["commit", "-qm", name]):
            subprocess.run([*git, *words], check=True)

    subprocess.run(["git", "init", "-q", str(repo)], check=True)
    for text in ("1", "2"):
        commit("python/dbmtl_kernels/__init__.py", text)
    commit("broken", "")
    monkeypatch.setattr(compare, "ROOT", repo)
    for _ in range(2):
        tree = compare.tree_of("HEAD~2")
        assert (tree / "python" / "dbmtl_kernels" / "__init__.py").read_text() == "1"
        assert (tree / "builds").read_text() == "built "
    assert (compare.tree_of("HEAD~1") / "python" / "dbmtl_kernels" / "__init__.py").read_text() == "2"
    for _ in range(2):  # what did not build is not taken for built
        with pytest.raises(BenchError, match=r"HEAD does not build.*no compiler"):
            compare.tree_of("HEAD")


def test_a_package_of_elsewhere_and_a_process_that_ends_are_told(tmp_path):
    with pytest.raises(BenchError, match="the package of base is not of"):
        compare.measure("tiny", {"base": tmp_path}, rounds=2)
    with pytest.raises(BenchError, match="ended while"):
        compare.measure("no such case", {"head": ROOT}, rounds=2)


def test_commands_are_told(capsys):
    assert command.main(["--help"]) == 0
    assert "compare" in capsys.readouterr().out
    assert command.main(["paint"]) == 2
