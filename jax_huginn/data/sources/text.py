"""Documents from text files: .txt and .py hold one each, .jsonl one a line, in the field `text`."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass

from jax_huginn.data.sources.bad import BadData
from jax_huginn.data.sources.files import DataError, TextFile, open_file

PIECE_BYTES = 128 * 1024  # text that is tokenized, and after a restore read again, at once


@dataclass(frozen=True)
class Document:
    """A document, or a part of one too long to be tokenized at once."""

    text: str
    begins: bool = True
    ends: bool = True


def text_pieces(file: TextFile, offset: int = 0, *, bad: BadData) -> Iterator[tuple[int, list[Document]]]:
    """Yields (byte offset, documents) from a text file, from `offset` on; 0 means the file's beginning.

    Bytes that are not UTF-8 become U+FFFD. A piece ends at a line end, so that no character is cut in two. A line of a
    .jsonl file that holds no document is left to the policy `bad`.
    """
    with open_file(file.path) as lines:
        end = lines.seek(0, os.SEEK_END) if file.end is None else file.end
        offset = lines.seek(max(offset, file.begin))
        while offset < end:
            raw, after = [], offset
            while after < min(
                offset + PIECE_BYTES, end
            ):  # not readlines(hint), which reads a line more at the hint itself
                raw.append(lines.readline())
                if not raw[-1]:
                    raise DataError(f"{file.path} became shorter while it was read: leave the data alone during a run")
                after += len(raw[-1])
            if file.path.suffix == ".jsonl":
                yield offset, _json_documents(file, offset, raw, bad)
            else:
                text = b"".join(raw).decode("utf-8", errors="replace")
                yield offset, [Document(text, begins=offset == file.begin, ends=after >= end)]
            offset = after
    bad.read(file)


def _json_documents(file: TextFile, offset: int, lines: list[bytes], bad: BadData) -> list[Document]:
    documents = []
    for index, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            text = json.loads(line.decode("utf-8", errors="replace"))["text"]
            if not isinstance(text, str):
                raise TypeError
        except (ValueError, KeyError, TypeError, RecursionError):
            bad.row(
                file, lambda index=index: _line_number(file, offset, index), 'is no JSON object with a string "text"'
            )
            continue
        # JSON may hold half a surrogate pair, which has no UTF-8; it becomes U+FFFD like any other broken character.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if text:
            documents.append(Document(text))
    return documents


def _line_number(file: TextFile, offset: int, index: int) -> str:
    number = index + 1
    with open_file(file.path) as before:
        while chunk := before.read(min(offset, 2**20)):
            number += chunk.count(b"\n")
            offset -= len(chunk)
    return f"line {number}"
