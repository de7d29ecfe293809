"""Which file and row a row of a batch came from, for the line that reports it."""

from typing import TYPE_CHECKING, Any

from jax_huginn.data.order import EPOCH, FILES, WINDOW, permutation

if TYPE_CHECKING:
    from jax_huginn.data.sources.files import TextFile
    from jax_huginn.data.streams import Pieces, RowDataset


def locate(dataset: "RowDataset", pieces: "Pieces", position: dict[str, Any], row: int) -> str:
    """'FILE, row 17' or, for text, 'FILE, byte 4096, token 17': where row number `row` of the next batch begins.

    Reads up to two windows of one stream again, so it is for the rare case.

    Args:
        pieces: reads a file as the dataset does, but counts what it skips for itself.
        position: the training iterator's state before the batch.
    """
    from jax_huginn.data.streams import RowReader

    process, processes = position.get("process", (0, 1))
    stream = (position["rows"] + row) % dataset._streams
    if stream % processes != process:
        return f"a file of process {stream % processes}"
    window, epoch, file, piece, item, taken = position["streams"][stream // processes]
    order = permutation(len(dataset._files), dataset._seed, FILES)
    files = [dataset._files[place] for place in order[stream :: dataset._streams]]
    reader = RowReader(files, pieces, dataset._take, dataset._stride, dataset._seed, stream)
    reader.seek((epoch, file, piece, item))
    wanted = taken + row // dataset._streams
    while True:
        begins = []
        while len(begins) < dataset._window and not (begins and reader.position[0] != begins[0][0]):
            begins.append(reader.position)
            reader.next_row()
        if wanted < len(begins):
            epoch, file, piece, item = begins[permutation(len(begins), dataset._seed, WINDOW, stream, window)[wanted]]
            found = files[permutation(len(files), dataset._seed, EPOCH, stream, epoch)[file]]
            return _describe(found, piece, item, rows=dataset._take == 1)
        wanted, window = wanted - len(begins), window + 1


def _describe(file: "TextFile", piece: int, item: int, rows: bool) -> str:
    return f"{file.path}, row {piece + item}" if rows else f"{file.path}, byte {piece}, token {item}"
