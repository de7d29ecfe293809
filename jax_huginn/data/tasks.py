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

    def example(self, bits: Iterator[int], difficulty: int) -> list[int]:
        """The tokens of an example, from the separator to the answer, which is the last one."""
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

    def example(self, bits: Iterator[int], difficulty: int) -> list[int]:
        first = cup = next(bits) % self.cups
        moves = [next(bits) % len(self.swaps) for _ in range(difficulty)]
        for one, other in (self.swaps[move] for move in moves):
            cup = other if cup == one else one if cup == other else cup
        separator, equals = (self.alphabet.index(each) for each in (self.separator, "="))
        return [separator, first, *(self.cups + move for move in moves), equals, cup]

    def row(self, bits: Iterator[int], length: int, hardest: int) -> Row:
        tokens = np.full(length, self.alphabet.index(self.separator), np.int32)
        labels = np.full(length, IGNORE, np.int32)
        groups = np.zeros(length, np.int32)
        begin = 0
        while True:
            count = 1 + next(bits) % hardest
            end = begin + self.longest(count)
            if end > length:
                return Row(tokens, labels, groups)
            tokens[begin:end] = self.example(bits, count)
            labels[end - 2], groups[end - 2] = tokens[end - 1], count
            begin = end


TASKS: dict[str, Task] = {"shell_game": ShellGame()}
"""By the names of `data.task`."""
