"""The paper's claims on real data: every method with the same sweep of rates, and a verdict on each claim.

``python -m benchmarks claims`` trains what the rows lack and prints the verdicts; ``--help`` tells the rest.
"""
