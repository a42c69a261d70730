"""One step: K backward passes, K rows, one balanced gradient. `step` has the protocol.

In: losses and the loss scale that arrives at their sum. Out: ``.grad`` of shared parameters and heads. `gradients`
alone reads and writes the shared ``.grad``. Of an optimizer it knows which parameters it steps, and when. Knows no
checkpoint file and no other library.
"""
