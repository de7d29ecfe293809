"""Documents from text files: one in each .txt or .py file, one a line in a .jsonl file (field `text`).

Memory is bounded whatever the text looks like: a long line is cut at a space, and a long document comes in parts.
"""

import codecs
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from jax_huginn.data.sources.bad_data import BadData
from jax_huginn.data.sources.files import CorpusFile, DataError, open_file

PIECE_BYTES = 128 * 1024  # text tokenized at once, and read again on resuming; up to twice as much to reach a line end
LONGEST_LINE = 64 * 2**20  # bytes of a .jsonl line, which is parsed whole
MARKS = (  # of UTF-32 before UTF-16, whose mark is a prefix
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


@dataclass(frozen=True)
class Document:
    """A document, or a part of a long one."""

    text: str
    begins: bool = True
    ends: bool = True


def text_pieces(file: CorpusFile, offset: int = 0, *, bad: BadData) -> Iterator[tuple[int, list[Document]]]:
    """Yield (byte offset, documents) of each piece of a text file, from `offset` on; 0 means the file's beginning.

    `bad` receives the rest of a file that cannot be decoded, and lines of a .jsonl file without a document. A
    byte-order mark decides the encoding and is no part of the text; without one it is UTF-8.
    """
    jsonl = _is_jsonl(file.path)
    with open_file(file.path) as stream:
        encoding, mark = _encoding(stream)
        if jsonl and encoding != "utf-8":
            return bad.file(file, f"is {encoding[:6].upper()}, but JSON lines must be UTF-8")
        last = stream.seek(0, os.SEEK_END) if file.end is None else file.end
        first = max(file.begin, mark)
        begin, end = _share(file, first, last)
        offset = max(offset, begin)
        while offset < end:
            stream.seek(offset)
            if jsonl:
                documents, after = _json_lines(file, stream, offset, end, bad)
            else:
                raw = _read_text(file, stream, offset, end, encoding)
                after = offset + len(raw)
                if complaint := _complaint(raw, offset, encoding):
                    return bad.file(file, complaint)
                documents = [Document(raw.decode(encoding), begins=offset == first, ends=after >= last)]
            yield offset, documents
            offset = after
    return bad.finished(file)


def _share(file: CorpusFile, first: int, last: int) -> tuple[int, int]:
    """Where a stream's part of the bytes from `first` to `last` begins and ends."""
    if file.share is None:
        return first, last
    low, high = (file.begin + each for each in file.share)
    begin = min(line_end(file.path, low), last) if file.share[0] else first
    return begin, last if high >= last else min(line_end(file.path, high), last)


def line_end(path: Path, offset: int) -> int:
    """The end of the line that contains byte `offset` - 1; in a line longer than a piece, a space or a character's end.

    Here a file may be cut. Lines of .jsonl files are never cut.
    """
    if offset <= 0:
        return 0
    with open_file(path) as stream:
        encoding, mark = _encoding(stream)
        unit = len(" ".encode(encoding))
        place = max(offset // unit * unit - unit, mark)
        stream.seek(place)
        raw = stream.read(PIECE_BYTES)
        if (newline := _find("\n", raw, encoding)) >= 0:
            return place + newline + unit
        if _is_jsonl(path):
            stream.readline()  # not bounded, but only here
            return stream.tell()
        if len(raw) < PIECE_BYTES:
            return place + len(raw)
        if (space := _find(" ", raw, encoding, unit)) >= 0:
            return place + space
        begin = unit
        while encoding == "utf-8" and begin < 4 and 0x80 <= raw[begin] < 0xC0:
            begin += 1
        return place + begin


def _is_jsonl(path: Path) -> bool:
    return path.suffix.lower() == ".jsonl"


def _encoding(stream: BinaryIO) -> tuple[str, int]:
    """The encoding and the length of its byte-order mark."""
    stream.seek(0)
    beginning = stream.read(4)
    for mark, name in MARKS:
        if beginning.startswith(mark):
            return name, len(mark)
    return "utf-8", 0


def _find(character: str, raw: bytes, encoding: str, begin: int = 0) -> int:
    """The first place of a character, at a multiple of its length; -1 if it is absent."""
    wanted = character.encode(encoding)
    place = raw.find(wanted, begin)
    while place > 0 and place % len(wanted):
        place = raw.find(wanted, place + 1)
    return place


def _read_text(file: CorpusFile, stream: BinaryIO, offset: int, end: int, encoding: str) -> bytes:
    """The bytes of a piece: up to the first line end after `PIECE_BYTES`, or else the last space within twice that."""
    raw = _read(file, stream, min(2 * PIECE_BYTES, end - offset))
    unit = len(" ".encode(encoding))
    whole = offset + len(raw) == end
    if whole and len(raw) <= PIECE_BYTES:
        return raw
    if (newline := _find("\n", raw, encoding, PIECE_BYTES - unit)) >= 0:
        return raw[: newline + unit]
    if whole:
        return raw
    space = raw.rfind(" ".encode(encoding))
    while space > 0 and space % unit:
        space = raw.rfind(" ".encode(encoding), 0, space + unit - 1)
    if space > 0:
        return raw[:space]  # tokenizers join a space to the following word
    decoder = codecs.getincrementaldecoder(encoding)("ignore")
    decoder.decode(raw)
    unfinished = decoder.getstate()[0]
    return raw[: len(raw) - len(unfinished)]


def _read(file: CorpusFile, stream: BinaryIO, count: int) -> bytes:
    raw = stream.read(count)
    if len(raw) < count:
        raise DataError(f"{file.path} became shorter while it was read: do not edit data during a run")
    return raw


def _complaint(raw: bytes, offset: int, encoding: str) -> str:
    """Why the bytes are not text, or an empty string."""
    if encoding == "utf-8" and raw.count(0) > len(raw) // 8:
        return "is binary, or UTF-16 without a byte-order mark"
    try:
        raw.decode(encoding)
    except UnicodeDecodeError as error:
        name = "UTF-8" if encoding == "utf-8" else encoding[:6].upper()
        return f"is not {name} (byte {raw[error.start]:#04x} at {offset + error.start})"
    return ""


def _json_lines(file: CorpusFile, stream: BinaryIO, offset: int, end: int, bad: BadData) -> tuple[list[Document], int]:
    """The documents of the lines that begin within `PIECE_BYTES`, and where they end."""
    documents, after, index = [], offset, 0
    while after < min(offset + PIECE_BYTES, end):
        line = stream.readline(LONGEST_LINE)
        if not line:
            raise DataError(f"{file.path} became shorter while it was read: do not edit data during a run")
        after += len(line)
        text: str | None
        if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
            text, reason = None, f"is longer than {LONGEST_LINE >> 20} MiB"
            while line and not line.endswith(b"\n"):
                line = stream.readline(LONGEST_LINE)
                after += len(line)
        else:
            text, reason = _json_text(line)
        if text is None:
            bad.row(file, lambda index=index: _line_number(file, offset, index), reason)
        else:
            documents += _parts(text)
            bad.read(1)
        index += 1
    return documents, after


def _json_text(line: bytes) -> tuple[str | None, str]:
    """A line's text, empty if it has none, or None and the reason why it is bad."""
    if not line.strip():
        return "", ""
    try:
        text = json.loads(line.decode())["text"]
        if not isinstance(text, str):
            raise TypeError
    except UnicodeDecodeError as error:
        return None, f"is not UTF-8 (byte {line[error.start]:#04x})"
    except (ValueError, KeyError, TypeError, RecursionError):
        return None, 'is not a JSON object with a string "text"'
    # JSON can contain half a surrogate pair, which UTF-8 cannot encode; it becomes U+FFFD.
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), ""


def _parts(text: str) -> Iterator[Document]:
    """A document in parts of at most 2 * `PIECE_BYTES` characters, cut as text files are."""
    begin = 0
    while begin < len(text):
        cut = len(text)
        if cut - begin > 2 * PIECE_BYTES:
            window = begin + 2 * PIECE_BYTES
            newline = text.find("\n", begin + PIECE_BYTES - 1, window)
            space = text.rfind(" ", begin + 1, window)
            cut = newline + 1 if newline >= 0 else space if space >= 0 else window
        yield Document(text[begin:cut], begins=begin == 0, ends=cut == len(text))
        begin = cut


def _line_number(file: CorpusFile, offset: int, index: int) -> str:
    number = index + 1
    with open_file(file.path) as before:
        while chunk := before.read(min(offset, 2**20)):
            number += chunk.count(b"\n")
            offset -= len(chunk)
    return f"line {number}"
