"""Makes the tasks' data from those files of Python's standard library that training never sees.

Everything is a function of the interpreter's own sources: the same Python gives the same questions, and scores
from different Python versions are not comparable. `python -m eval_tasks.build FOLDER` writes the data to look at.
"""

import hashlib
import io
import json
import keyword
import os
import random
import re
import tokenize
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax_huginn.config.cli import OneLineParser, run_verb
from jax_huginn.data.sources.files import stdlib_files
from jax_huginn.data.sources.split import is_held_out

if TYPE_CHECKING:
    from datasets import DatasetDict

VALIDATION_FRACTION = 0.05  # as data.validation_fraction; a run with another share must say so, see the datasets below
QUESTIONS_PER_FILE = 32  # so that a few long files do not ask everything
DISTANCE = 4  # lines between the questions of a file
CONTEXT_CHARACTERS = 320  # so that context and choice fit the default model's 256 tokens
CHOICES = 4
SHORTEST, LONGEST = 20, 64  # characters of a line worth asking for, without and with its indentation
MOST_NAMES = 8  # in such a line: their exchanges grow with the cube
PIECES = 64
PIECE_BYTES = 2000
SOFT_KEYWORDS = {"match", "case", "type", "_"}
TOKEN = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class Line:
    """A line worth asking for."""

    file: str
    number: int
    """Counted from 0."""
    raw: str
    """The line as it is."""
    names: tuple[tuple[int, int], ...]
    """Where each of its identifiers begins and ends."""

    @property
    def text(self) -> str:
        return self.raw.strip()

    @property
    def indent(self) -> str:
        return self.raw[: len(self.raw) - len(self.raw.lstrip())]


def continuation_dataset(validation_fraction: float = VALIDATION_FRACTION, **_: Any) -> "DatasetDict":
    """`stdlib_continuation` for lm-eval, which passes the task's metadata, `validation_fraction` and more."""
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
    """Rows of `file`, `line`, `context`, `choices` and `answer` (the index of the right choice).

    A wrong choice is the right line with two or three of its names in each other's places. So all four have the same
    words, the same length and the same punctuation. Of their adjacent words and signs, equally many occur in the
    context: what a choice shares with the context says nothing, only the order of the names does. No wrong choice is a
    line of the library.
    """
    texts = dict(_texts())
    known = {line.strip() for text in texts.values() for line in text.splitlines()}
    held_out = {name: text for name, text in texts.items() if is_held_out(name, validation_fraction)}
    lines = [line for name, text in held_out.items() for line in code_lines(name, text)]

    questions = []
    asked: dict[str, list[int]] = defaultdict(list)
    for line in sorted(lines, key=lambda line: _order(line.file, line.number)):
        numbers = asked[line.file]
        if len(numbers) >= QUESTIONS_PER_FILE or any(abs(line.number - number) < DISTANCE for number in numbers):
            continue
        question = _question(line, held_out[line.file].splitlines(), known)
        if question is not None:
            numbers.append(line.number)
            questions.append(question)
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
    """Lines of code worth asking for: a statement's first, of middling length, no import, of three names or more."""
    names = _names_of_statements(text)
    for number, raw in enumerate(text.splitlines()):
        line = raw.strip()
        if (
            3 <= len(names.get(number, ())) <= MOST_NAMES
            and len(line) >= SHORTEST
            and len(raw.rstrip()) <= LONGEST
            and not line.startswith(("import ", "from "))
        ):
            yield Line(file, number, raw.rstrip(), tuple(names[number]))


def _names_of_statements(text: str) -> dict[int, list[tuple[int, int]]]:
    """Where the names of each statement's first line are, by that line (from 0); empty for what does not tokenize."""
    names: dict[int, list[tuple[int, int]]] = {}
    fresh = True  # whether the next token begins a statement
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING)
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            row = token.start[0] - 1
            if token.type == tokenize.NEWLINE:
                fresh = True
            elif token.type not in skipped and fresh:
                fresh = False
                names[row] = []
            if (
                token.type == tokenize.NAME
                and row in names
                and not keyword.iskeyword(token.string)
                and token.string not in SOFT_KEYWORDS
            ):
                names[row].append((token.start[1], token.end[1]))
    except (tokenize.TokenError, SyntaxError):
        return {}
    return names


def _question(line: Line, file_lines: list[str], known: set[str]) -> dict[str, Any] | None:
    """The row that asks for `line`, or None when too few exchanges of its names are as good by their words."""
    context = _context(file_lines, line.number)
    pairs = _pairs(context)

    def shared(text: str) -> int:
        return len(_pairs(text) & pairs)

    wrong = sorted(text for text in _exchanges(line) - known if shared(text) == shared(line.text))
    if not context or len(wrong) < CHOICES - 1:
        return None
    rng = random.Random(f"{line.file}:{line.number}")
    choices = [line.text, *rng.sample(wrong, CHOICES - 1)]
    rng.shuffle(choices)
    return {
        "file": line.file,
        "line": line.number + 1,
        "context": context + line.indent,  # every choice has the same indentation
        "choices": choices,
        "answer": choices.index(line.text),
    }


def _context(lines: list[str], number: int) -> str:
    """As many whole lines before line `number` as CONTEXT_CHARACTERS hold."""
    context = ""
    for line in reversed(lines[:number]):
        if len(line) + 1 + len(context) > CONTEXT_CHARACTERS:
            break
        context = line + "\n" + context
    return context


def _exchanges(line: Line) -> set[str]:
    """The line with two names exchanged or three rotated, in every way that changes it."""
    words = [line.raw[begin:end] for begin, end in line.names]
    swaps = [(i, j) for i, j in combinations(range(len(words)), 2)]
    rotations = [order for i, j, k in combinations(range(len(words)), 3) for order in ((i, j, k), (i, k, j))]
    texts = set()
    for places in [*swaps, *rotations]:
        moved = list(words)
        for place, source in zip(places, places[1:] + places[:1], strict=True):
            moved[place] = words[source]
        text, end = "", 0
        for (begin, following), word in zip(line.names, moved, strict=True):
            text += line.raw[end:begin] + word
            end = following
        texts.add((text + line.raw[end:]).strip())
    return texts - {line.text}


def _words(text: str) -> set[str]:
    return set(TOKEN.findall(text))


def _pairs(text: str) -> set[tuple[str, str]]:
    """Adjacent words and signs."""
    return set(pairwise(TOKEN.findall(text)))


def baselines(questions: list[dict[str, Any]]) -> dict[str, float]:
    """Accuracy of rules that need no model, ties shared among the choices that the rule cannot tell apart."""

    def copied(context: str, choice: str) -> int:
        text, tokens = f" {' '.join(TOKEN.findall(context))} ", TOKEN.findall(choice)
        runs = combinations(range(len(tokens) + 1), 2)
        return max((end - begin for begin, end in runs if f" {' '.join(tokens[begin:end])} " in text), default=0)

    rules: dict[str, Callable[[str, str], int]] = {
        "most words of the context": lambda context, choice: len(_words(choice) & _words(context)),
        "most adjacent pairs of the context": lambda context, choice: len(_pairs(choice) & _pairs(context)),
        "longest run copied from the context": copied,
        "shortest": lambda _, choice: -len(choice),
    }
    accuracies = {}
    for name, rule in rules.items():
        points = 0.0
        for question in questions:
            values = [rule(question["context"], choice) for choice in question["choices"]]
            best = max(values)
            points += (values[question["answer"]] == best) / values.count(best)
        accuracies[name] = points / len(questions)
    return accuracies


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
    for rule, accuracy in baselines(continuation_questions()).items():
        print(f"stdlib_continuation by the rule '{rule}': {accuracy:.3f}")


if __name__ == "__main__":
    run_verb(main)
