"""The arithmetic of scale: what must hold of it, and its command. Bytes are counted in tests/distributed."""

from dataclasses import replace

import pytest

from benchmarks.__main__ import main
from benchmarks.scale import command, formulas
from benchmarks.scale.formulas import DDP, FORMS, FSDP2, HSDP, ONE_PASS, ONE_ROW, PLAIN, ROWS, Collective, Job, Machine

MACHINE = Machine()


def test_one_gpu_is_the_table_of_the_architecture():
    job = Job(1e9, 3)
    assert formulas.moved(job, ROWS) == formulas.moved(job, ONE_ROW) == (4 * 3 + 1) * 4e9
    assert formulas.held(job, ROWS) == (3 + 1) * 4e9
    assert formulas.held(job, ONE_ROW) == formulas.held(job, PLAIN) == 4e9
    assert [formulas.sent(job, form) for form in FORMS] == [0.0] * 4


def test_rings():
    assert Collective("all-gather", 80.0, 8, "after").sent == 70.0
    assert Collective("all-reduce", 80.0, 8, "after").sent == 140.0


def test_where_only_passes_count_the_time_is_one_and_two_k_over_three():
    job, machine = Job(1e9, 11, gpus=8), Machine(flops=1.0, hbm=1e30, nvlink=1e30, network=1e30)
    over = {form: formulas.seconds(job, form, machine) / formulas.seconds(job, PLAIN, machine) for form in FORMS}
    assert over[ROWS] == over[ONE_ROW] == pytest.approx((1 + 2 * 11) / 3)
    assert over[ONE_PASS] == pytest.approx(1 + 2 / 3 / 10)


@pytest.mark.parametrize("wrapper", [DDP, FSDP2, HSDP])
@pytest.mark.parametrize("form", FORMS)
def test_what_more_of_something_does(wrapper, form):
    job = Job(7e9, 5, wrapper, 64)
    for what in (formulas.held, formulas.sent, formulas.moved):
        assert what(replace(job, parameters=14e9), form) == pytest.approx(2 * what(job, form))
    slower = [replace(MACHINE, **{name: getattr(MACHINE, name) / 2}) for name in ("flops", "hbm", "nvlink", "network")]
    assert all(formulas.seconds(job, form, machine) >= formulas.seconds(job, form, MACHINE) for machine in slower)
    assert formulas.fits(job, form, replace(MACHINE, memory=1e15))
    assert not formulas.fits(job, form, replace(MACHINE, memory=1e6))
    many = replace(job, tasks=20)
    assert (formulas.held(many, form) > formulas.held(job, form)) == (form == ROWS)


def test_shares_of_the_parameters():
    of = {wrapper: Job(8e9, 2, wrapper, 64) for wrapper in (DDP, FSDP2, HSDP)}
    assert [(job.shards, job.replicas, job.columns) for job in of.values()] == [
        (1, 64, 8e9),
        (64, 1, 1.25e8),
        (8, 8, 1e9),
    ]
    assert formulas.held(of[FSDP2], ROWS) == 3 * 4 * 1.25e8
    assert formulas.held(of[DDP], ROWS) == 4 * (8e9 + 2 * 8e9 / 64 + 8e9 + 8e9 / 64)


def test_the_command(capsys):
    assert main(["scale", "--parameters", "7", "--gpus", "1", "64", "--tasks", "3", "--width", "250"]) == 0
    out = capsys.readouterr().out
    assert "Arithmetic, not measured" in out
    line = next(line for line in out.splitlines() if "HSDP" in line).split()
    job = Job(7e9, 3, HSDP, 64)
    assert line[:3] == ["64", "HSDP", "3"]
    over = formulas.seconds(job, ROWS, MACHINE) / formulas.seconds(job, PLAIN, MACHINE)
    assert line[-1] == f"{over:.2f}"
    assert line[-4] == command.short(formulas.held(job, ROWS) / 1e9)


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--gpus", "12"], "12 GPUs are not whole nodes of 8"), (["--gpus", "0"], "must be at least 1, got 0")],
)
def test_what_makes_no_sense_is_refused(words, said, capsys):
    try:
        status = main(["scale", *words])
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    assert said in capsys.readouterr().err


def test_all_of_the_issue_is_there():
    found = list(command.jobs())
    assert len(found) == 4 * 4 * (1 + 2 + 3 + 3)
    assert {job.wrapper for job in found} == {DDP, FSDP2, HSDP}
    for kind in ("holds", "moves", "sends", "time"):
        assert len(command.markdown(kind).splitlines()) == 2 + 4 * 9
