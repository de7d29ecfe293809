"""The model: blocks, Mixture of Experts, recurrence, and MoE-Huginn as a whole.

Names of arrays end in their shape, a letter per axis, here and in `ops`, `parallel` and `training`:

    B batch (rows)          D width                    E routed experts             U micro-batches
    S sequence              H query heads              A experts active per token   Z devices along a mesh axis
    T tokens, B times S     G key and value heads      M expert hidden width        R recurrences
    V vocabulary            K head width               C slots per expert           P blocks of assignments
    L positions of a cache  J rotary pairs, K / 2      N assignments, T times A
    F MLP hidden width

A lower-case letter is a part of the upper-case axis: e experts of this device, s positions of a chunk, t tokens of a
block, n assignments of a block, r recurrences that a cache keeps apart. A digit is an axis of that size.
"""
