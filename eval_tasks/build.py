"""Makes the tasks' data from those files of Python's standard library that training never sees.

Everything is a function of the interpreter's own sources: the same Python gives the same questions, and scores
from different Python versions are not comparable. `python -m eval_tasks.build FOLDER` writes the data to look at.
"""

import hashlib
import io
import json
import os
import random
import tokenize
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax_huginn.config.cli import OneLineParser, run_verb
from jax_huginn.data.sources.files import stdlib_files
from jax_huginn.data.sources.split import is_held_out

if TYPE_CHECKING:
    from datasets import DatasetDict

VALIDATION_FRACTION = 0.05  # as data.validation_fraction; a run with another share must say so, see the datasets below
QUESTIONS = 400
QUESTIONS_PER_FILE = 32  # so that a few long files do not ask everything
DISTANCE = 4  # lines between the questions of a file
CONTEXT_LINES = 16
CHOICES = 4
LINE_CHARACTERS = range(20, 101)  # of a line worth asking for, without its indentation
LENGTH_TOLERANCE = 0.2  # by which a wrong choice may be shorter or longer than the right one
PIECES = 64
PIECE_BYTES = 2000


@dataclass(frozen=True)
class Line:
    """A line worth asking for."""

    file: str
    number: int
    """Counted from 0."""
    indent: str
    text: str
    """Without indentation and trailing space."""


def continuation_dataset(validation_fraction: float = VALIDATION_FRACTION, **_: Any) -> "DatasetDict":
    """`stdlib_continuation` for lm-eval, which passes the task's metadata, `validation_fraction` included."""
    return _in_memory(continuation_questions(validation_fraction))


def perplexity_dataset(validation_fraction: float = VALIDATION_FRACTION, **_: Any) -> "DatasetDict":
    """`stdlib_perplexity` for lm-eval."""
    return _in_memory(perplexity_pieces(validation_fraction))


def build(folder: Path, validation_fraction: float = VALIDATION_FRACTION) -> None:
    """Writes both data sets as FOLDER/<task>.jsonl, a JSON object a line; an earlier file is replaced at once."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (
        ("stdlib_continuation", continuation_questions(validation_fraction)),
        ("stdlib_perplexity", perplexity_pieces(validation_fraction)),
    ):
        unfinished = folder / f".{name}.{os.getpid()}.tmp"
        unfinished.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        os.replace(unfinished, folder / f"{name}.jsonl")


def continuation_questions(validation_fraction: float = VALIDATION_FRACTION) -> list[dict[str, Any]]:
    """Up to QUESTIONS rows of `file`, `line`, `context`, `choices` and `answer` (the index of the right choice).

    The context ends with the line's indentation, so that every choice has the same indentation. Wrong choices are
    lines of other held-out files, indented alike and about as long; how many of them are shorter than the right one
    is drawn first, so that length gives nothing away. Every choice occurs once in the library, training files included.
    """
    texts = dict(_texts())
    occurrences = Counter(line.strip() for text in texts.values() for line in text.splitlines())
    held_out = {name: text for name, text in texts.items() if is_held_out(name, validation_fraction)}
    lines = [line for name, text in held_out.items() for line in code_lines(name, text) if occurrences[line.text] == 1]
    by_indent: dict[str, list[Line]] = defaultdict(list)
    for line in lines:
        by_indent[line.indent].append(line)

    questions = []
    asked: dict[str, list[int]] = defaultdict(list)
    for line in sorted(lines, key=lambda line: _order(line.file, line.number)):
        numbers = asked[line.file]
        if len(numbers) >= QUESTIONS_PER_FILE or any(abs(line.number - number) < DISTANCE for number in numbers):
            continue
        question = _question(line, held_out[line.file].splitlines(), by_indent[line.indent])
        if question is not None:
            numbers.append(line.number)
            questions.append(question)
        if len(questions) == QUESTIONS:
            break
    return questions


def perplexity_pieces(validation_fraction: float = VALIDATION_FRACTION) -> list[dict[str, Any]]:
    """Up to PIECES rows of `file`, `piece` and `text`: whole lines, about PIECE_BYTES bytes of UTF-8."""
    pieces = []
    for name, text in _texts():
        if not is_held_out(name, validation_fraction):
            continue
        piece, size, count = [], 0, 0
        for line in text.splitlines(keepends=True):
            piece.append(line)
            size += len(line.encode())
            if size >= PIECE_BYTES:
                pieces.append({"file": name, "piece": count, "text": "".join(piece)})
                piece, size, count = [], 0, count + 1
    return sorted(pieces, key=lambda row: _order(row["file"], row["piece"]))[:PIECES]


def code_lines(file: str, text: str) -> Iterator[Line]:
    """Lines of code worth asking for: late enough, of middling length, no import, comment, string or continuation."""
    starts = _statement_starts(text)
    lines = text.splitlines()
    for number, raw in enumerate(lines):
        line = raw.strip()
        if (
            number >= CONTEXT_LINES
            and number in starts
            and len(line) in LINE_CHARACTERS
            and lines[number - 1].strip()
            and not line.startswith(("import ", "from "))
        ):
            yield Line(file, number, raw[: len(raw) - len(raw.lstrip())], line)


def _statement_starts(text: str) -> set[int]:
    """Lines (from 0) on which a statement begins that is no bare string; empty for what does not tokenize."""
    starts, fresh = set(), True
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING)
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.NEWLINE:
                fresh = True
            elif token.type not in skipped and fresh:
                fresh = False
                if token.type != tokenize.STRING:
                    starts.add(token.start[0] - 1)
    except (tokenize.TokenError, SyntaxError):
        return set()
    return starts


def _question(line: Line, file_lines: list[str], candidates: list[Line]) -> dict[str, Any] | None:
    """The row that asks for `line`, or None when there are too few similar lines in other files."""
    rng = random.Random(f"{line.file}:{line.number}")
    length = len(line.text)
    similar = [
        other
        for other in candidates
        if other.file != line.file
        and other.text != line.text
        and 0 < abs(len(other.text) - length) <= LENGTH_TOLERANCE * length
    ]
    shorter = [other.text for other in similar if len(other.text) < length]
    longer = [other.text for other in similar if len(other.text) > length]
    count = rng.randrange(CHOICES)
    if len(shorter) < count or len(longer) < CHOICES - 1 - count:
        return None
    choices = [line.text, *rng.sample(shorter, count), *rng.sample(longer, CHOICES - 1 - count)]
    rng.shuffle(choices)
    context = "\n".join(file_lines[line.number - CONTEXT_LINES : line.number])
    return {
        "file": line.file,
        "line": line.number + 1,
        "context": context + "\n" + line.indent,
        "choices": choices,
        "answer": choices.index(line.text),
    }


def _texts() -> Iterator[tuple[str, str]]:
    """(relative path, text) of every file that is UTF-8, in the order of the paths."""
    for file in stdlib_files():
        try:
            yield file.relative_path, file.path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue


def _order(file: str, number: int) -> bytes:
    """A sort key that mixes the files evenly and does not depend on which other files there are."""
    return hashlib.sha256(f"{file}:{number}".encode()).digest()


def _in_memory(rows: list[dict[str, Any]]) -> "DatasetDict":
    from datasets import Dataset, DatasetDict

    return DatasetDict({"test": Dataset.from_list(rows)})


def main(arguments: list[str] | None = None) -> None:
    parser = OneLineParser(prog="python -m eval_tasks.build", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder to write the data into; it is created")
    build(parser.parse_args(arguments).folder)


if __name__ == "__main__":
    run_verb(main)
