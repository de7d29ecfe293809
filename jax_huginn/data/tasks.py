"""Tasks whose examples are made as they are needed, of any difficulty; a row is packed with as many as it holds.

An example is text that ends with its answer. The answer alone is learnt: everything before it is random.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import combinations, permutations

import numpy as np

from jax_huginn.data.rows import IGNORE, Row


class Task(ABC):
    """A kind of example; one character is one token. The one before an answer is `=`."""

    separator = "\n"
    """The character in front of every example, which is also the tokenizer's BOS and EOS."""
    alphabet: str
    """All characters; the index of one is its token."""

    @abstractmethod
    def longest(self, difficulty: int) -> int:
        """Tokens of an example of this difficulty, with its separator."""

    @abstractmethod
    def example(self, bits: Iterator[int], difficulty: int) -> list[int]:
        """The tokens of an example, from the separator to the answer, which is the last one."""

    def row(self, bits: Iterator[int], length: int, hardest: int) -> Row:
        """A row of `length` tokens, packed with whole examples whose difficulties are uniform in 1..`hardest`.

        Args:
            bits: random integers below 2**64; `length` of them are enough.
        """
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

    def _tokens(self, text: str) -> list[int]:
        return [self.alphabet.index(each) for each in text]


class ShellGame(Task):
    """A ball under one of five cups, and swaps of two cups each: `2CAFJB=4` asks where it is at the end.

    The first digit is the ball's cup, each letter one of the ten swaps, the last digit the answer. The difficulty is
    the number of swaps. Every swap moves the ball with probability 2/5, so the answer needs all of them in order.
    """

    cups = 5
    swaps = tuple(combinations(range(cups), 2))
    alphabet = "12345" + "ABCDEFGHIJ" + "=" + Task.separator

    def longest(self, difficulty: int) -> int:
        return difficulty + 4

    def example(self, bits: Iterator[int], difficulty: int) -> list[int]:
        first = cup = next(bits) % self.cups
        moves = [next(bits) % len(self.swaps) for _ in range(difficulty)]
        for one, other in (self.swaps[move] for move in moves):
            cup = other if cup == one else one if cup == other else cup
        separator, equals = self._tokens(self.separator + "=")
        return [separator, first, *(self.cups + move for move in moves), equals, cup]


class Products(Task):
    """Six ways to rearrange three things, one after the other: `cbfd=e` asks for the one that does it all at once.

    Each letter is an element of the symmetric group S3 in lexicographic order, `a` the one that changes nothing. The
    difficulty is the number of factors. A later factor is applied to the result of the earlier ones.
    """

    elements = tuple(permutations(range(3)))
    alphabet = "abcdef" + "=" + Task.separator

    def longest(self, difficulty: int) -> int:
        return difficulty + 3

    def example(self, bits: Iterator[int], difficulty: int) -> list[int]:
        factors = [next(bits) % len(self.elements) for _ in range(difficulty)]
        product = self.elements[0]
        for factor in factors:
            product = tuple(product[place] for place in self.elements[factor])
        separator, equals = self._tokens(self.separator + "=")
        return [separator, *factors, equals, self.elements.index(product)]


class LastDigit(Task):
    """Digits to add up: `3514=3` asks for the last digit of their sum. The difficulty is their number.

    All digits count, in any order: one look at all of them at once is enough, so nothing has to be done step by step.
    """

    alphabet = "0123456789" + "=" + Task.separator

    def longest(self, difficulty: int) -> int:
        return difficulty + 3

    def example(self, bits: Iterator[int], difficulty: int) -> list[int]:
        digits = [next(bits) % 10 for _ in range(difficulty)]
        separator, equals = self._tokens(self.separator + "=")
        return [separator, *digits, equals, sum(digits) % 10]


class MostFrequent(Task):
    """Letters to count: `BADBE=B` asks for the most frequent one, the first in the alphabet among equals.

    The difficulty is the number of letters. All count, in any order, as in `LastDigit`.
    """

    alphabet = "ABCDE" + "=" + Task.separator

    def longest(self, difficulty: int) -> int:
        return difficulty + 3

    def example(self, bits: Iterator[int], difficulty: int) -> list[int]:
        letters = [next(bits) % 5 for _ in range(difficulty)]
        separator, equals = self._tokens(self.separator + "=")
        return [separator, *letters, equals, max(range(5), key=letters.count)]


TASKS: dict[str, Task] = {
    "shell_game": ShellGame(),
    "products": Products(),
    "last_digit": LastDigit(),
    "most_frequent": MostFrequent(),
}
"""By the names of `data.task`."""
