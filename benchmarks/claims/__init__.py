"""The paper's claims on real data: every method with the same sweep of rates, and a verdict on each claim.

``python -m benchmarks claims`` trains what the rows lack and prints the verdicts; ``--help`` tells the rest.
"""

import sys
from pathlib import Path

# Modules beside this package, and the MultiMNIST of the examples
sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "examples")]
