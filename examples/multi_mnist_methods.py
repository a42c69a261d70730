"""The methods of the paper's Figure 1 on MultiMNIST, each with and without the log transformation, in one table.

PCGrad, GradVac, IMTL-G, CAGrad, Nash-MTL and Aligned-MTL are TorchJD's weightings, given to our `GradientBalancer`;
beside them equal weighting, max-norm balancing alone, and DB-MTL. Network, data, learning-rate sweep, initial weights
and batches are those of multi_mnist.py. Exit status 0 only if the networks trained.

Source: arXiv 2308.12029, Figure 1 (there on NYUv2).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import dbmtl_kernels as dbk
import torch

try:
    import multi_mnist_training
    from dbmtl_kernels.integrations.torchjd import grad_vac, nash_mtl
    from multi_mnist import exit_status, find_failures, parse_args, train_all
    from multi_mnist_report import choose, print_results
    from multi_mnist_training import (
        DB_MTL,
        MAX_NORM_ONLY,
        NUM_TASKS,
        SINGLE_TASK,
        MultiTaskNet,
        Objective,
    )
    from rich.console import Console
    from torchjd.aggregation import (
        AlignedMTLWeighting,
        CAGradWeighting,
        IMTLGWeighting,
        PCGradWeighting,
    )
except ImportError as error:
    sys.exit(f"{error}. Needed: pip install 'dbmtl-kernels[demo,torchjd]'")

CAGRAD_C = 0.4  # its authors' on NYUv2

# Each weighs the gradients of the step itself: beta is 0, as their papers have it
METHODS: dict[str, Callable[[], Callable[[torch.Tensor], torch.Tensor]]] = {
    "equal weighting": dbk.EqualWeights,
    "PCGrad": PCGradWeighting,
    "GradVac": lambda: grad_vac(NUM_TASKS),
    "IMTL-G": IMTLGWeighting,
    "CAGrad": lambda: CAGradWeighting(c=CAGRAD_C),
    "Nash-MTL": lambda: nash_mtl(NUM_TASKS),
    "Aligned-MTL": AlignedMTLWeighting,
}
LOG = " + log"


def make_objective(method: str, model: MultiTaskNet) -> Objective:
    """The balancer of a method, its name ending in `LOG` if the losses' logarithms are balanced."""
    if method in (SINGLE_TASK, MAX_NORM_ONLY, DB_MTL):
        return multi_mnist_training.make_objective(method, model)
    weighting = METHODS[method.removesuffix(LOG)]()
    return dbk.GradientBalancer(
        model.trunk.parameters(), NUM_TASKS, weighting=weighting, log_transform=method.endswith(LOG)
    )


def main(argv: list[str] | None = None) -> int:
    """Run the comparison.

    Returns:
        the exit status: 0 if the networks trained, else 1.
    """
    begin = time.perf_counter()
    args = parse_args(argv, __doc__, picture=False)
    console = Console()
    methods = [name for plain in METHODS for name in (plain, plain + LOG)] + [MAX_NORM_ONLY, DB_MTL]
    runs = train_all(args, methods, make_objective)
    results = choose(runs, args.lr)
    print_results(console, results, args.lr)
    console.print(f"{time.perf_counter() - begin:.0f} s in all.", highlight=False)
    return exit_status(find_failures(runs, results))


if __name__ == "__main__":
    sys.exit(main())
