"""The model: blocks, Mixture of Experts, recurrence, and MoE-Huginn as a whole.

The name of an array ends in its shape, one letter per axis. These are the letters of `ops`, `parallel`, `model`,
`inference` and `training`; a lower-case letter is a part of its upper-case axis, and a digit is an axis of that size:

    B  batch                      S  sequence                   D  model width
    V  vocabulary                 F  MLP hidden width           K  head width
    H  query heads                G  key and value heads        J  rotary pairs, K / 2
    T  tokens, B times S          N  assignments, T times A     P  blocks of assignments
    E  routed experts             A  experts per token          M  expert hidden width
    C  slots per expert           L  positions of a cache       R  recurrences
    U  micro-batches              Z  devices of a mesh axis     Q  routers
    I  inputs of a weight         O  outputs of a weight

    s  positions of one chunk     h  query heads per key head   n  assignments of one block
    e  experts of one device      r  recurrences kept apart by a cache

Inside the program of one device, B and T are its own sequences and tokens.
"""
