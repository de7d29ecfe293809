"""Tasks whose examples are made as they are needed, of any difficulty; a row is packed with as many as it holds.

An example is text, of which the answers alone are learnt: everything else is random.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import combinations, permutations

import numpy as np

from jax_huginn.data.rows import IGNORE, Row


class Task(ABC):
    """A kind of example; one character is one token."""

    separator = "\n"
    """The character in front of every example, which is also the tokenizer's BOS and EOS."""
    alphabet: str
    """All characters; the index of one is its token."""

    @abstractmethod
    def example(self, bits: Iterator[int], difficulty: int) -> list[int]:
        """The tokens of an example, from the separator to the answer, which is the last one."""

    def part_of_row(self, bits: Iterator[int], difficulty: int) -> Row:
        """An example as it is in a row."""
        tokens = np.array(self.example(bits, difficulty), np.int32)
        labels, groups = np.full_like(tokens, IGNORE), np.zeros_like(tokens)
        labels[-2], groups[-2] = tokens[-1], difficulty
        return Row(tokens, labels, groups)

    def longest(self, difficulty: int) -> int:
        """Tokens of an example of this difficulty in a row."""
        return len(self.part_of_row(iter([0] * (difficulty + 1)), difficulty).tokens)

    def row(self, bits: Iterator[int], length: int, hardest: int) -> Row:
        """A row of `length` tokens, packed with whole examples whose difficulties are uniform in 1..`hardest`.

        Args:
            bits: random integers below 2**64; `length` + 1 of them are enough.
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
            part = self.part_of_row(bits, count)
            tokens[begin:end], labels[begin:end], groups[begin:end] = part
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

    def example(self, bits: Iterator[int], difficulty: int) -> list[int]:
        first = cup = next(bits) % self.cups
        moves = [next(bits) % len(self.swaps) for _ in range(difficulty)]
        for one, other in (self.swaps[move] for move in moves):
            cup = other if cup == one else one if cup == other else cup
        separator, equals = self._tokens(self.separator + "=")
        return [separator, first, *(self.cups + move for move in moves), equals, cup]


class Products(Task):
    """Ways to rearrange three things, one after the other: which one does all of `cbfd` at once?

    Each letter is an element of the symmetric group S3 in lexicographic order, `a` the one that changes nothing. In a
    row the product so far is learnt at every letter: with the last product alone a model learns no more than a few
    factors. The difficulty is their number. A later factor is applied to the result of the earlier ones.
    """

    elements = tuple(permutations(range(3)))
    alphabet = "abcdef" + Task.separator

    def example(self, bits: Iterator[int], difficulty: int) -> list[int]:
        part = self.part_of_row(bits, difficulty)
        return [*part.tokens.tolist(), int(part.labels[-1])]

    def part_of_row(self, bits: Iterator[int], difficulty: int) -> Row:
        factors = [next(bits) % len(self.elements) for _ in range(difficulty)]
        product, products = self.elements[0], []
        for factor in factors:
            product = tuple(product[place] for place in self.elements[factor])
            products.append(self.elements.index(product))
        tokens = [*self._tokens(self.separator), *factors]
        parts = (tokens, [IGNORE, *products], range(difficulty + 1))
        return Row(*(np.array(each, np.int32) for each in parts))


class LastDigit(Task):
    """Digits to add up: `3514=3` asks for the last digit of their sum. The difficulty is their number.

    All digits count, in any order: one look at all of them at once is enough, so nothing has to be done step by step.
    """

    alphabet = "0123456789" + "=" + Task.separator

    def example(self, bits: Iterator[int], difficulty: int) -> list[int]:
        digits = [next(bits) % 10 for _ in range(difficulty)]
        separator, equals = self._tokens(self.separator + "=")
        return [separator, *digits, equals, sum(digits) % 10]


class MostFrequent(Task):
    """Letters to count: `BADBE=B` asks for the most frequent one, the first in the alphabet among equals.

    The difficulty is the number of letters. All count, in any order, as in `LastDigit`.
    """

    alphabet = "ABCDE" + "=" + Task.separator

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
