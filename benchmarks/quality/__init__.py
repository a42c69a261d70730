"""Quality trial: does one backward pass, or one row, learn as well as exact DB-MTL? Seven settings on real data.

``python -m benchmarks.quality run --resume`` trains, ``python -m benchmarks.quality report`` prints the tables.
"""
