"""DB-MTL in one ordinary backward pass.

In: K losses. Out: a scalar whose backward weighs each task's gradient where it enters what several tasks share. Knows
nothing of rows; only `OnePassDBMTL.__call__` falls back on the exact form.
"""
