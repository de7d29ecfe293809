"""Tasks whose examples are made as they are needed, of any difficulty; a row is packed with as many as it holds.

An example is text. Its answer alone is learnt: everything before it is random.
"""

from collections.abc import Iterator
from itertools import combinations
from typing import Protocol

import numpy as np

from jax_huginn.data.rows import IGNORE, Row


class Task(Protocol):
    """A kind of example; one character is one token."""

    alphabet: str
    """All characters; the index of one is its token."""
    separator: str
    """The character in front of every example, which is also the tokenizer's BOS and EOS."""

    def longest(self, difficulty: int) -> int:
        """Tokens of an example of this difficulty, with its separator."""
        ...

    def row(self, bits: Iterator[int], length: int, hardest: int) -> Row:
        """A row of `length` tokens, packed with whole examples whose difficulties are uniform in 1..`hardest`.

        Args:
            bits: random integers below 2**64; `length` of them are enough.
        """
        ...


class ShellGame:
    """A ball under one of five cups, and swaps of two cups each: `2CAFJB=4` asks where it is at the end.

    The first digit is the ball's cup, each letter one of the ten swaps, the last digit the answer. The difficulty is
    the number of swaps. Every swap moves the ball with probability 2/5, so the answer needs all of them in order.
    """

    cups = 5
    swaps = tuple(combinations(range(cups), 2))
    separator = "\n"
    alphabet = "12345" + "ABCDEFGHIJ" + "=" + separator

    def longest(self, difficulty: int) -> int:
        return difficulty + 4

    def row(self, bits: Iterator[int], length: int, hardest: int) -> Row:
        equals, separator = self.alphabet.index("="), self.alphabet.index(self.separator)
        tokens = np.full(length, separator, np.int32)
        labels = np.full(length, IGNORE, np.int32)
        groups = np.zeros(length, np.int32)
        begin = 0
        while True:
            count = 1 + next(bits) % hardest
            end = begin + self.longest(count)
            if end > length:
                return Row(tokens, labels, groups)
            first = cup = next(bits) % self.cups
            moves = [next(bits) % len(self.swaps) for _ in range(count)]
            for one, other in (self.swaps[move] for move in moves):
                cup = other if cup == one else one if cup == other else cup
            tokens[begin:end] = [separator, first, *(self.cups + move for move in moves), equals, cup]
            labels[end - 2], groups[end - 2] = cup, count
            begin = end


TASKS: dict[str, Task] = {"shell_game": ShellGame()}
"""By the names of `data.task`."""
