"""What the harness asks of a model, whichever framework runs it: token ids in, numbers out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Reading:
    """Tokens for the model to read, and the continuations that its last positions are to predict."""

    tokens: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Score:
    """How likely the model finds one continuation."""

    log_probabilities: tuple[float, ...]
    """One for each token, in nats."""
    greedy: bool
    """Whether greedy decoding would produce the continuation."""
    used: int | None = None
    """Recurrences of all tokens that were read for it; None where each had the depth that was set."""
    computed: int | None = None
    """The same with those that were computed for tokens that had exited already."""


@dataclass(frozen=True)
class Written:
    """What the model wrote after one prompt."""

    tokens: list[int]
    """New tokens only."""
    used: float | None = None
    """Recurrences of the prompt's tokens and of these, its share of the batch's; None where each had the set depth."""
    computed: float | None = None
    """The same with those that were computed for tokens that had exited already, and for padding."""


class LanguageModel(Protocol):
    """A model that is loaded. No row of a batch influences another."""

    vocab_size: int
    max_length: int
    """Longest sequence, in tokens."""
    device: str
    dtype: str
    """The type that it computes in."""
    version: str
    """Name and version of the framework."""

    def log_probabilities(self, readings: Sequence[Reading], recurrence: int) -> list[list[Score]]:
        """The score of every continuation of every reading, in one batch."""
        ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: Sequence[int],
        recurrence: int,
        finished: Callable[[int, list[int]], bool],
    ) -> list[Written]:
        """New tokens after every prompt, chosen greedily, at most its `max_new_tokens`.

        A row ends once `finished(row, its new tokens)` holds; its last token is included.
        """
        ...
