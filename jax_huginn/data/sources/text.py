"""Documents from text files: one in each .txt or .py file, one a line in a .jsonl file (field `text`)."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass

from jax_huginn.data.sources.bad_data import BadData
from jax_huginn.data.sources.files import CorpusFile, DataError, open_file

PIECE_BYTES = 128 * 1024  # text tokenized at once, and read again on resuming


@dataclass(frozen=True)
class Document:
    """A document, or a part of a long one."""

    text: str
    begins: bool = True
    ends: bool = True


def text_pieces(file: CorpusFile, offset: int = 0, *, bad: BadData) -> Iterator[tuple[int, list[Document]]]:
    """Yield (byte offset, documents) of each piece of a text file, from `offset` on; 0 means the file's beginning.

    Bytes that are not UTF-8 become U+FFFD. Pieces end at line ends, so no character is cut in two. Lines of a .jsonl
    file without a document are handed to `bad`.
    """
    with open_file(file.path) as lines:
        end = lines.seek(0, os.SEEK_END) if file.end is None else file.end
        offset = lines.seek(max(offset, file.begin))
        while offset < end:
            raw, after = [], offset
            # Not readlines(hint), which reads one line more if a line ends exactly at the hint.
            while after < min(offset + PIECE_BYTES, end):
                raw.append(lines.readline())
                if not raw[-1]:
                    raise DataError(f"{file.path} became shorter while it was read: do not edit data during a run")
                after += len(raw[-1])
            if file.path.suffix == ".jsonl":
                yield offset, _json_documents(file, offset, raw, bad)
            else:
                text = b"".join(raw).decode("utf-8", errors="replace")
                yield offset, [Document(text, begins=offset == file.begin, ends=after >= end)]
            offset = after
    bad.finished(file)


def _json_documents(file: CorpusFile, offset: int, lines: list[bytes], bad: BadData) -> list[Document]:
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
                file, lambda index=index: _line_number(file, offset, index), 'is not a JSON object with a string "text"'
            )
            continue
        # JSON can contain half a surrogate pair, which UTF-8 cannot encode; it becomes U+FFFD.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if text:
            documents.append(Document(text))
    return documents


def _line_number(file: CorpusFile, offset: int, index: int) -> str:
    number = index + 1
    with open_file(file.path) as before:
        while chunk := before.read(min(offset, 2**20)):
            number += chunk.count(b"\n")
            offset -= len(chunk)
    return f"line {number}"
