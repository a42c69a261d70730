"""``python -m dbmtl_kernels bench``, on tiny cases."""

import re
import sys

import pytest
import torch
from dbmtl_kernels.bench import cases, command, dense, gradients, memory, models, results, show, steps
from torch import nn

TINY = ["--seconds", "3", "--batch", "4", "--params", "200"]
EAGER = [*TINY, "--only", "dbmtl_kernels", "eager", "bare passes", "equal weighting"]


@pytest.fixture
def bench(tmp_path, monkeypatch, capsys):
    """Runs the command; its exit code, and the rows in its file."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        code = command.main([*words, "--out", "rows.csv"])
        path = tmp_path / "rows.csv"
        run.out, run.err = capsys.readouterr()
        return code, results.read(path) if path.exists() else []

    return run


@pytest.mark.slow
def test_every_level_has_rows_a_table_and_a_picture(bench, tmp_path):
    code, rows = bench(*EAGER)
    assert code == 0
    timed = {level: {row.contender for row in rows if row.what == level and row.p50} for level in show.LEVELS}
    eager = {f"eager ({kind})" for kind in steps.KINDS}
    ours = {cases.ROWS, cases.ONE_ROW, cases.ONE_PASS}
    assert timed["step"] == {cases.BARE, cases.LET_GO, cases.EW, *ours, *eager, "copy"}
    assert timed["grads"] == {cases.LISTS, cases.EW, *eager, "copy"}
    assert timed["op"] == {cases.OP, cases.EW, "eager (lerp_)", "eager (mul_, add_)", "eager (foreach)", "copy"}
    assert all(0 < row.p20 <= row.p50 <= row.p80 and row.rounds >= 3 for row in rows if row.unit == "ms")
    (op,) = (row for row in rows if row.what == "op" and row.contender == cases.OP)
    assert (op.K, op.P, op.bytes, op.ratio, op.over) == (3, 200, 13 * 200 * 4, 1.0, cases.OP)
    (copy,) = (row for row in rows if row.what == "op" and row.contender == "copy")
    assert copy.of_copy == pytest.approx(1.0)
    for name in (cases.OP, "DBMTL takes", "rows.csv", "rows.png"):
        assert name in bench.out
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")


def test_resume_leaves_out_what_is_done_and_an_interrupt_keeps_it(bench, monkeypatch):
    run, ran = cases.run, []

    def interrupted(case, *given):
        if case.level == "grads" and not ran.count("grads"):
            ran.append("grads")
            raise KeyboardInterrupt
        ran.append(case.level)
        return run(case, *given)

    monkeypatch.setattr(cases, "run", interrupted)
    code, rows = bench(*EAGER, "--levels", "op", "grads")
    assert code == 130
    assert "1 of 2 cases are done and kept" in bench.err
    assert {row.what.split()[0] for row in rows} == {"op"}
    code, more = bench(*EAGER, "--levels", "op", "grads", "--resume")
    assert (code, ran) == (0, ["op", "grads", "grads"])
    assert more[: len(rows)] == rows
    assert "from a K x P matrix" in bench.out  # what was measured before is shown too
    code, same = bench(*EAGER, "--levels", "op", "grads", "--resume")
    assert (code, same, len(ran)) == (0, more, 3)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--only", "pcgrad"], "--only pcgrad: no such contender; families are dbmtl_kernels, eager"),
        (["--only", "TorchJD", "--levels", "op"], "nobody of these takes part in op"),
        (["--params", "resnet"], "--params resnet: neither a number of parameters"),
        (["--params", "0"], "--params 0: neither"),
        (["--params", "1e15"], "takes .* GB and more"),
        (["--tasks", "0"], "must be positive"),
        (["--model", "factories"], "write module:factory"),
        (["--model", "factories:absent"], "has no attribute 'absent'"),
        (["--model", "no_such_module:it"], "No module named 'no_such_module'"),
        (["--model", "factories:apart"], "share no parameter"),
        (["--model", "factories:other_batch"], "it must use one and the same batch"),
        (["--model", "factories:broken"], "it raised ZeroDivisionError"),
        (["--model", "factories:nothing"], "it must return losses"),
    ],
    ids=lambda given: " ".join(given) if isinstance(given, list) else "",
)
def test_what_the_user_can_set_right_is_told_before_anything_runs(bench, monkeypatch, tmp_path, words, said):
    (tmp_path / "factories.py").write_text(FACTORIES)
    monkeypatch.setattr(cases, "run", None)
    sys.modules.pop("factories", None)
    code, rows = bench(*words)
    assert (code, rows) == (2, [])
    assert re.search(said, bench.err)


def test_a_device_that_is_absent(bench, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert bench("--device", "cuda")[0] == 2
    assert "there are 0 CUDA devices here" in bench.err


def test_a_results_file_of_another_schema_is_left_alone(bench, monkeypatch, tmp_path):
    (tmp_path / "rows.csv").write_text("contender,ms\n")
    monkeypatch.setattr(cases, "run", None)
    assert command.main(["--out", "rows.csv"]) == 2
    assert (tmp_path / "rows.csv").read_text() == "contender,ms\n"


FACTORIES = """
import torch
from torch import nn

def model():
    torch.manual_seed(0)
    trunk, heads = nn.Sequential(nn.Linear(5, 7), nn.Dropout()), nn.ModuleList(nn.Linear(7, 1) for _ in range(2))
    x = torch.randn(6, 5)
    return trunk, heads, lambda: [(head(trunk(x)) - t).square().mean() for t, head in enumerate(heads, 1)]

def found():
    return model()[2]

def given():
    trunk, heads, losses = model()
    optimizer = torch.optim.SGD([*trunk.parameters(), *heads.parameters()], lr=1e-3)
    return losses, list(trunk.parameters()), optimizer

def apart():
    a, b = nn.Linear(2, 1), nn.Linear(2, 1)
    return lambda: [a(torch.ones(2)).square().sum(), b(torch.ones(2)).square().sum()]

def other_batch():
    trunk, heads, _ = model()
    count = iter(range(100))
    return lambda: [head(trunk(torch.ones(6, 5) * next(count))).square().mean() for head in heads]

def broken():
    return 1 / 0

def nothing():
    return None

def rounded():
    losses = model()[2]
    def both():
        with torch.autocast("cpu", torch.bfloat16):
            return losses()
    return both
"""


@pytest.mark.parametrize("factory", ["found", "given", "rounded"])
def test_a_model_of_ones_own(bench, tmp_path, factory):
    (tmp_path / "factories.py").write_text(FACTORIES)
    sys.modules.pop("factories", None)
    code, rows = bench("--model", f"factories:{factory}", "--seconds", "2", "--only", "dbmtl_kernels", "eager",
                       "authors' arithmetic", "TorchJD")  # fmt: skip
    assert code == 0
    assert {(row.model, row.K, row.P) for row in rows} == {(f"factories:{factory}", 2, 42)}
    assert not [row for row in rows if "verdict" in row.detail]
    assert {row.what for row in rows if row.p50 and row.contender == cases.ROWS} == {"step", "step held", "step peak"}


def wrong(lists):
    right = gradients.eager("cat")(lists)
    return lambda: [grad * 1.01 for grad in right()]


def test_who_is_wrong_is_reported_and_not_timed(bench, monkeypatch):
    monkeypatch.setattr(dense, "eager_addmul", lambda grads, ema: dense.eager_lerp(grads, ema) * 1.01)
    _, rows = bench(*EAGER, "--levels", "op")
    (said,) = (row for row in rows if row.contender == "eager (mul_, add_)")
    assert (said.p50, said.detail["verdict"][:36]) == (None, "wrong, not timed: ValueError: the ba")
    assert "wrong, not timed" in bench.out
    lists = gradients.Lists.random(3, [(40, 7), (3,)], torch.device("cpu"))
    wanted = gradients.expected(lists)
    with pytest.raises(ValueError, match="the balanced gradient is off by 1"):
        gradients.check(lists, wrong, wanted)
    for make in (gradients.ours, *map(gradients.eager, steps.KINDS), lambda lists: gradients.authors(lists, True)):
        gradients.check(lists, make, wanted)


@pytest.mark.parametrize(("make", "expects"), [(steps.bare, "last"), (steps.bare_let_go, "sum"),
                         (steps.one_pass, "balanced"), (steps.equal_weighting, "balanced")])  # fmt: skip
def test_a_step_that_does_something_else_is_caught(make, expects):
    with pytest.raises(ValueError, match="is off by"):
        steps.check(models.mlp(3, (16, 32, 16), 8), make, expects)


def test_under_autocast_the_rounding_of_the_model_is_allowed_and_no_more():
    torch.manual_seed(0)
    problem = models.mlp(3, (16, 32, 16), 8)
    problem.losses = torch.autocast("cpu", torch.bfloat16)(problem.losses)
    for make, expects in ((steps.ours, "balanced"), (steps.one_pass, "balanced, beta=0"), (steps.bare, "sum")):
        steps.check(problem, make, expects)
    with pytest.raises(ValueError, match=r"the balanced \.grad is off by .*, allowed is [0-9.]+e-0[23]"):
        steps.check(problem, steps.equal_weighting, "balanced")


def test_without_a_compiler_or_time_to_compile_it_is_said(bench, monkeypatch):
    monkeypatch.setattr(cases, "compiler_missing", lambda device: "torch.compile needs a C++ compiler")
    _, rows = bench(*TINY, "--levels", "op", "--only", "dbmtl_kernels", "torch.compile")
    said = {row.detail.get("verdict") for row in rows if row.contender.startswith("torch.compile")}
    assert said == {"left out: torch.compile needs a C++ compiler"}
    monkeypatch.undo()
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert cases.compiler_missing(torch.device("cpu")) == "torch.compile needs a C++ compiler"


def test_without_rich_and_matplotlib_there_is_a_plain_table(bench, monkeypatch):
    for name in ("rich", "rich.box", "rich.console", "rich.progress", "rich.table", "matplotlib.figure",
                 "matplotlib.backends.backend_agg"):  # fmt: skip
        monkeypatch.setitem(sys.modules, name, None)
    code, _ = bench(*EAGER, "--levels", "op")
    assert code == 0
    assert "no picture: it needs matplotlib (pip install 'dbmtl-kernels[bench]')" in bench.out
    assert cases.OP in bench.out
    assert "... op K=3 P=200 float32" in bench.err


def test_memory_is_that_of_the_third_step():
    def make():
        kept = []

        def call():
            if not kept:
                kept.append(torch.ones(1000, dtype=torch.float32))
            passing = torch.ones(3000, dtype=torch.float32)
            del passing
            return torch.ones(500, dtype=torch.float32)

        return call

    assert memory.taken(make, torch.device("cpu")) == (6000, 16000, 16000)


def test_sizes():
    assert {name: models.size(name).num_params for name in ("resnet18", "resnet50", "vit-l")} == {
        "resnet18": 11_176_512, "resnet50": 23_508_032, "vit-l": 303_301_632,
    }  # fmt: skip
    assert [models.size(text).num_params for text in ("300M", "20e6", "1.5b", "7")] == [
        3 * 10**8,
        20_000_000,
        15 * 10**8,
        7,
    ]
    trunk = nn.Sequential(nn.Linear(*models.widths_of(8_000_000)[:2]))
    assert trunk[0].in_features == 1000


def test_one_pass_counts_what_it_measures():
    # Steps 3 to 8 of a run whose first two are warm-up: all are measured in 4 and 8.
    assert cases._one_pass([1.0, 5.0, 1.0, 1.0, 1.0, 5.0]) == (1.0, 5.0)
