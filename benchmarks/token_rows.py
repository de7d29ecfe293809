"""Turn a folder of text into token rows for a run with `data.source=parquet`, and a tokenizer trained on it.

    python benchmarks/token_rows.py linux-source-6.1 --folders fs net --suffixes .c .h --out runs/corpus

Writes OUT/tokenizer, OUT/train/*.parquet and OUT/held_out.parquet. A file is a document; a hash of its path decides
whether it is held out. Training rows are the documents in a random order, one after another. A held-out row is a window
of one document, at a random place in it, so that every row is another document and they can be averaged as independent.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jax_huginn.config.cli import OneLineParser, run_verb
from jax_huginn.data.permutation import permutation, random_bits
from jax_huginn.data.sources.split import is_held_out
from jax_huginn.data.sources.text import Document
from jax_huginn.data.tokenizer import Encoder, save_tokenizer, train_tokenizer

SAMPLE = 32_000_000  # characters that the tokenizer is trained on
TOGETHER = 64  # documents encoded at once
ORDER, PLACE = 0, 1  # purposes of random numbers


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of text")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--folders", nargs="+", default=["."], help="of the source, which are read (all)")
    parser.add_argument("--suffixes", nargs="+", default=[".txt"], help="of files, which are read (.txt)")
    parser.add_argument("--largest", type=int, default=256, help="files above this size are tables: kB (256)")
    parser.add_argument("--held-out", type=float, default=0.08, help="share of files (0.08)")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--length", type=int, default=512, help="tokens that a row predicts (512)")
    parser.add_argument("--parts", type=int, default=8, help="training files (8)")
    options = parser.parse_args()

    paths = sorted(
        path
        for folder in options.folders
        for path in (options.source / folder).rglob("*")
        if path.suffix in options.suffixes and path.is_file() and not path.is_symlink()
        if path.stat().st_size <= options.largest * 1000
    )
    names = [path.relative_to(options.source).as_posix() for path in paths]
    held_out = [index for index, name in enumerate(names) if is_held_out(name, options.held_out)]
    training = sorted(set(range(len(names))) - set(held_out))
    training = [training[place] for place in permutation(len(training), ORDER)]

    options.out.mkdir(parents=True)
    tokenizer = train_tokenizer(_sample([paths[index] for index in training]), options.vocabulary)
    save_tokenizer(tokenizer, options.out / "tokenizer")
    encode = Encoder(tokenizer)

    tokens = np.concatenate([
        encode([Document(_text(paths[index])) for index in training[begin : begin + TOGETHER]])
        for begin in range(0, len(training), TOGETHER)
    ])  # fmt: skip
    length = options.length
    rows = (len(tokens) - 1) // length
    starts = np.arange(rows) * length
    for part in range(options.parts):
        own = starts[part * rows // options.parts : (part + 1) * rows // options.parts]
        _write(options.out / f"train/{part:02}.parquet", tokens[own[:, None] + np.arange(length + 1)])

    windows, documents = [], []
    for index in held_out:
        ids = encode([Document(_text(paths[index]))])
        if len(ids) > length:
            begin = int(random_bits(1, PLACE, index)[0] % (len(ids) - length))
            windows.append(ids[begin : begin + length + 1])
            documents.append(names[index])
    _write(options.out / "held_out.parquet", np.stack(windows), documents)
    size = sum(paths[index].stat().st_size for index in training)
    print(
        f"{len(training)} documents of {size / 1e6:.1f} MB are {len(tokens) / 1e6:.2f} M tokens in {rows} rows; "
        f"{len(windows)} rows of {len(held_out)} held-out documents, the others being shorter than a row"
    )


def _text(path: Path) -> str:
    return path.read_bytes().decode("utf-8", errors="replace")


def _sample(paths: list[Path]) -> Iterator[str]:
    spent = 0
    for path in paths:
        text = _text(path)
        spent += len(text)
        yield text
        if spent >= SAMPLE:
            return


def _write(path: Path, rows: np.ndarray, documents: list[str] | None = None) -> None:
    """Token rows as the trainer reads them; 16 bits a token and zstd, about what the text itself compresses to."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(exist_ok=True)
    values = pa.array(rows.astype(np.uint16).ravel())
    columns = {"input_ids": pa.FixedSizeListArray.from_arrays(values, rows.shape[1])}
    columns |= {"document": pa.array(documents)} if documents else {}
    pq.write_table(pa.table(columns), path, compression="zstd", compression_level=19, use_dictionary=False)


if __name__ == "__main__":
    run_verb(main)
