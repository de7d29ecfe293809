"""Generation: a cache of keys and values by recurrence, exits by row and token, sampling. Knows token ids only."""

from jax_huginn.inference.batching import Schedule
from jax_huginn.inference.decode import Generated, Totals, generate
from jax_huginn.inference.exits import Exit
from jax_huginn.inference.iterations import Iterations, return_iterations
from jax_huginn.inference.sampling import Sampling
from jax_huginn.inference.speculation import Drafts

__all__ = [
    "Drafts",
    "Exit",
    "Generated",
    "Iterations",
    "Sampling",
    "Schedule",
    "Totals",
    "generate",
    "return_iterations",
]
