"""A row of a batch whose labels are its own, and batches of rows."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

IGNORE = -100  # label excluded from the loss


class Row(NamedTuple):
    """At most S tokens of which only some are learnt; a plain array of up to S + 1 tokens is learnt as a whole."""

    tokens: np.ndarray
    """(n,) int32."""
    labels: np.ndarray
    """(n,) int32: at position i the token after it, or `IGNORE` where that is not learnt."""
    groups: np.ndarray
    """(n,) int32: the group, from 1, under which validation reports a label's accuracy; 0 for none."""


def batch_of(rows: Sequence[np.ndarray | Row], length: int) -> dict[str, np.ndarray]:
    """`tokens` and `labels`, both (B,S) int32; shorter rows are padded, with labels ignored."""
    tokens = np.zeros((len(rows), length), np.int32)
    labels = np.full((len(rows), length), IGNORE, np.int32)
    for index, row in enumerate(rows):
        own = (row.tokens, row.labels) if isinstance(row, Row) else (row[:-1], row[1:])
        tokens[index, : len(own[0])], labels[index, : len(own[0])] = own
    return {"tokens": tokens, "labels": labels}


def batch_with_groups(rows: Sequence[Row], length: int) -> dict[str, np.ndarray]:
    """`batch_of` and `groups`, (B,S) int32."""
    groups = np.zeros((len(rows), length), np.int32)
    for index, row in enumerate(rows):
        groups[index, : len(row.groups)] = row.groups
    return batch_of(rows, length) | {"groups": groups}
