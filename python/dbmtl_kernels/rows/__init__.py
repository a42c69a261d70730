"""The K x P state: one padded row per task, on one device, sharded over replicas, or split over devices and meshes.

In: parameters, then gradients with the coefficients of their update. Out: sums of squares, the Gramian, the combination
of the rows. `placement.place` chooses the buffer and the ranks. Knows no losses, no steps, no weighting and no ``.grad``.
"""
