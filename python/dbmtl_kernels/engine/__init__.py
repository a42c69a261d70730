"""One step: K backward passes, K rows, one balanced gradient. `step` is the protocol, top to bottom on one screen.

In: losses and the caller's factor. Out: ``.grad`` of shared parameters and heads. `gradients` alone reads and writes
the shared ``.grad``. Knows no optimizer, no checkpoint file and no other library.
"""
