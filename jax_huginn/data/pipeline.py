"""From a config to batches: the tokenizer, the endless training iterator and the fixed validation batches."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jax_huginn.config.schema import Config
from jax_huginn.data.batches import TrainBatches
from jax_huginn.data.contents import Contents, contents_of
from jax_huginn.data.permutation import permutation
from jax_huginn.data.rows import batch_of, batch_with_groups
from jax_huginn.data.sources import corpus
from jax_huginn.data.sources.bad_data import BadData
from jax_huginn.data.sources.download import UnreachableError
from jax_huginn.data.sources.files import CorpusFile, DataError
from jax_huginn.data.sources.parquet import parquet_pieces, row_byte
from jax_huginn.data.sources.text import PIECE_BYTES, text_pieces
from jax_huginn.data.tasks import TASKS
from jax_huginn.data.tokenizer import (
    Encoder,
    character_tokenizer,
    is_byte_level,
    load_tokenizer,
    save_tokenizer,
    token_bytes,
    tokenizer_digest,
    train_tokenizer,
    vocabulary_size,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from jax_huginn.data.reader import Pieces

TOKENIZER_BYTES = 32 * 2**20  # text that a tokenizer is trained on: about 4 s on two cores
VALIDATION_SEED = 0  # not train.seed, so that runs with different seeds are measured on the same rows
VALIDATION_POOL = 4  # rows read for each one chosen


@dataclass(frozen=True)
class Data:
    """The data of a run. A batch is a dict of `tokens` and `labels`, both (B,S) int32, see `rows`."""

    tokenizer: "PreTrainedTokenizerFast | None"
    """None for token rows whose tokenizer was not named."""
    train: TrainBatches
    """Endless. Its state is that after the last batch returned; `close()` stops its threads."""
    validation: list[dict[str, np.ndarray]]
    """Fixed batches of held-out rows, padded with label -100; empty only if nothing is held out. Those of a generated
    task also have `groups`, (B,S) int32: the difficulty where there is a label."""
    token_bytes: np.ndarray | None
    """UTF-8 bytes of each token, (V,) int32; None without a byte-level tokenizer."""


def build_data(
    config: Config,
    tokenizer_dir: Path,
    *,
    report: Callable[[str], None] = print,
    process: int = 0,
    processes: int = 1,
) -> Data:
    """Open the data of a run; its tokenizer is written to `tokenizer_dir` (RUN/tokenizer), or read there on resuming.

    Args:
        report: called with a line for everything skipped or fetched again, also from other threads.
        process, processes: process p of P gets rows p, p + P, ... of every training batch, and whole validation
            batches.

    Raises:
        DataError: a path, file, row or tokenizer cannot be used.
    """
    import grain

    from jax_huginn.data.streams import RowDataset

    size = config.train.batch_size // config.train.micro_batches
    if size % processes:
        raise DataError(
            f"train.batch_size={config.train.batch_size} in train.micro_batches={config.train.micro_batches} is {size} "
            f"sequence(s) at once, which {processes} processes cannot share evenly"
        )
    if config.data.source == "generated":
        return _generated(config, tokenizer_dir, report, process, processes)
    hub = None
    if config.data.source == "hub":
        from jax_huginn.data.sources.hub import HubFiles

        hub = HubFiles(config.data, tokenizer_dir.parent, report)
        training, held_out = hub.training, hub.held_out
    else:
        training, held_out = corpus(config.data, report)
    tokenizer = _tokenizer(config, training, tokenizer_dir, report)
    contents = contents_of(training, held_out, tokenizer_digest(tokenizer) if tokenizer else "")
    length = config.train.sequence_length
    settings: dict[str, Any] = {"sequence_length": length, **contents.order()}
    if config.data.source in ("parquet", "hub"):
        take, stride = 1, 1
    else:
        assert tokenizer is not None
        take, stride = length + 1, length
        settings["tokenizer"] = contents.tokenizer

    def pieces(bad: BadData, held_out: bool) -> "Pieces":
        if tokenizer is not None and take > 1:
            return _token_pieces(tokenizer, bad)
        rows = partial(parquet_pieces, length=length + 1, vocab_size=config.model.vocab_size, bad=bad)
        return hub.local_pieces(rows, keep=held_out) if hub else rows

    bad = BadData(config.data.bad_rows, report)
    rows = RowDataset(
        training,
        pieces(bad, held_out=False),
        take=take,
        stride=stride,
        seed=config.train.seed,
        streams=config.data.streams,
        shuffle_window=config.data.shuffle_window,
        settings=settings,
        process=process,
        processes=processes,
        bad=bad,
        watcher=hub,
        bytes_before=_bytes_before(config),
    )
    if hub:
        hub.own(rows.owned)
    batches = rows.batch(
        config.train.batch_size // processes, drop_remainder=True, batch_fn=partial(batch_of, length=length)
    )
    bad_held_out = BadData(config.data.bad_rows, report)
    validation = _validation(config, held_out, pieces(bad_held_out, held_out=True), take, stride, bad_held_out)
    uncounted = BadData(config.data.bad_rows, lambda _: None)
    train = grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=config.data.prefetch)
    return Data(
        tokenizer=tokenizer,
        train=TrainBatches(
            iter(train),
            hub,
            partial(rows.locate, pieces(uncounted, held_out=False)),
            partial(_keep, config, contents, tokenizer, tokenizer_dir) if process == 0 else lambda: None,
            lambda order: contents.check(order, tokenizer_dir.parent),
            rows.epochs,
        ),
        validation=validation,
        token_bytes=token_bytes(tokenizer, config.model.vocab_size) if tokenizer and is_byte_level(tokenizer) else None,
    )


def _generated(
    config: Config, tokenizer_dir: Path, report: Callable[[str], None], process: int, processes: int
) -> Data:
    """The data of a task whose rows are made as they are needed."""
    import grain

    from jax_huginn.data.generated import GeneratedRows, held_out_rows

    data, length = config.data, config.train.sequence_length
    needed = TASKS[data.task].longest(max(data.difficulty, data.test_difficulty))
    if length < needed:
        raise DataError(
            f"train.sequence_length={length} is too short for data.task={data.task}: an example of difficulty "
            f"{max(data.difficulty, data.test_difficulty)} has {needed} tokens"
        )
    tokenizer = _tokenizer(config, [], tokenizer_dir, report)
    rows = GeneratedRows(
        data.task,
        length=length,
        difficulty=data.difficulty,
        curriculum_rows=data.curriculum_rows,
        seed=config.train.seed,
        process=process,
        processes=processes,
    )
    batches = rows.batch(
        config.train.batch_size // processes, drop_remainder=True, batch_fn=partial(batch_of, length=length)
    )
    train = grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=data.prefetch)
    size, wanted = _validation_sizes(config)
    held_out = held_out_rows(data.task, count=wanted, length=length, hardest=data.test_difficulty, seed=VALIDATION_SEED)
    return Data(
        tokenizer=tokenizer,
        train=TrainBatches(iter(train), locate=rows.locate),
        validation=[batch_with_groups(held_out[begin : begin + size], length) for begin in range(0, wanted, size)],
        token_bytes=None,
    )


def _bytes_before(config: Config) -> Callable[[CorpusFile, int], float] | None:
    """Bytes of a file before a piece: a byte of a text file, or a row of a parquet file on this machine."""
    if config.data.source == "hub":  # a file need not be here
        return None
    return row_byte if config.data.source == "parquet" else lambda file, piece: piece - file.begin


def _keep(config: Config, contents: Contents, tokenizer: "PreTrainedTokenizerFast | None", folder: Path) -> None:
    """Write what the data are into the run folder; not earlier, or a resume that is refused would overwrite it."""
    try:
        contents.write(folder.parent)
        if tokenizer and config.data.tokenizer and tokenizer_digest(load_tokenizer(str(folder))) != contents.tokenizer:
            save_tokenizer(tokenizer, folder)
    except OSError as error:
        raise DataError(f"{error.filename} cannot be written: {error.strerror}") from None


def _token_pieces(tokenizer: "PreTrainedTokenizerFast", bad: BadData) -> "Pieces":
    encode = Encoder(tokenizer)

    def pieces(file: CorpusFile, offset: int) -> Iterator[tuple[int, np.ndarray]]:
        for begin, documents in text_pieces(file, offset, bad=bad):
            yield begin, encode(documents)

    return pieces


def _tokenizer(
    config: Config, training: list[CorpusFile], folder: Path, report: Callable[[str], None]
) -> "PreTrainedTokenizerFast | None":
    name, vocab_size = config.data.tokenizer, config.model.vocab_size
    if name:
        try:
            tokenizer = load_tokenizer(name, report)
        except UnreachableError as error:
            if (folder / "tokenizer.json").exists():
                report(f"{error}: using the one in {folder}")
                name, tokenizer = str(folder), load_tokenizer(str(folder))
            elif config.data.source in ("parquet", "hub"):
                report(
                    f"warning: {error}: the run trains without it, so it measures no bits per byte and leaves no "
                    f"{folder}, which an evaluation needs; a restart with a network adds both"
                )
                return None
            else:
                raise
    elif config.data.source in ("parquet", "hub"):
        return None
    elif config.data.source == "generated":
        task = TASKS[config.data.task]
        name, tokenizer = f"of data.task={config.data.task}", character_tokenizer(task.alphabet, task.separator)
    elif (folder / "tokenizer.json").exists():
        name, tokenizer = str(folder), load_tokenizer(str(folder))
    else:
        report(f"training a tokenizer of {vocab_size} tokens")
        began = time.perf_counter()
        tokenizer = train_tokenizer(_sample(training), vocab_size)
        report(f"trained it in {time.perf_counter() - began:.1f} s")
    size = vocabulary_size(tokenizer)
    if size > vocab_size:
        raise DataError(f"the tokenizer {name} has {size} tokens, more than model.vocab_size={vocab_size}: raise it")
    if not (folder / "tokenizer.json").exists():
        save_tokenizer(tokenizer, folder)
    return tokenizer


def _sample(files: list[CorpusFile]) -> Iterator[str]:
    """About `TOKENIZER_BYTES` of text: the beginnings of the files, in a fixed random order."""
    share, spent = max(TOKENIZER_BYTES // len(files), PIECE_BYTES), 0
    bad = BadData("skip", lambda line: None)  # training itself reports bad data, or stops
    for index in permutation(len(files), 0):
        for offset, documents in text_pieces(files[index], bad=bad):
            if offset - files[index].begin >= share:
                break
            spent += sum(len(document.text) for document in documents)
            yield from (document.text for document in documents)
            if spent >= TOKENIZER_BYTES:
                return


def _validation_sizes(config: Config) -> tuple[int, int]:
    """Rows of a validation batch, which fit into the device's memory at once, and rows in all."""
    size = config.train.batch_size // config.train.micro_batches
    return size, max(config.validation.sequences // size, 1) * size


def _validation(
    config: Config, files: list[CorpusFile], pieces: "Pieces", take: int, stride: int, bad: BadData
) -> list[dict[str, np.ndarray]]:
    """Full batches of rows chosen by a fixed seed from a larger pool, or one padded batch of all rows there are."""
    from jax_huginn.data.reader import RowReader
    from jax_huginn.data.spans import Spans

    if not files:
        return []
    size, wanted = _validation_sizes(config)
    reader = RowReader(Spans(files, VALIDATION_SEED), pieces, take, stride, 0, bad)
    pool = [row for _, row in zip(range(VALIDATION_POOL * wanted), reader.epoch_rows(), strict=False)]
    if not pool:
        raise DataError(f"{len(files)} held-out file(s), {files[0].path} first, contain no data: hold out more")
    chosen = sorted(permutation(len(pool), VALIDATION_SEED)[: max(min(wanted, len(pool) // size * size), size)])
    rows = [pool[index] for index in chosen]
    rows += [np.zeros(1, np.int32)] * (-len(rows) % size)  # a row without a label
    return [batch_of(rows[begin : begin + size], config.train.sequence_length) for begin in range(0, len(rows), size)]
