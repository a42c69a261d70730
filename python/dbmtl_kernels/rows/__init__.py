"""The K x P state: one padded row per task, on one device, sharded over replicas, or split over devices and meshes.

In: parameters, then gradients with decay and gain of their update. Out: sums of squares, the Gramian, the sum of the
weighted rows. `placement.place` chooses the buffer and the ranks. Of weightings it knows `MaxNorm`'s formula alone,
which the kernels compute. Knows no losses, no optimizer and no ``.grad``.
"""
