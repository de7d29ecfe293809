"""Where documents and token rows come from.

A file is read in pieces: some 128 KiB of a text file, or some rows of a parquet file. A piece starts at a byte offset
or a row number, which a checkpoint stores; resuming reads one piece again, never the files before it.

`files`: finding files. `split`: holding some out for validation. `text`, `parquet`: reading them. `bad_data`: skipping
what cannot be used. `hub`: files of a Hugging Face dataset, through `download` and the bounded folder of `cache` and
`cache_policy`.
"""

from collections import Counter
from collections.abc import Callable

from jax_huginn.config.schema import DataConfig
from jax_huginn.data.sources.files import CorpusFile, DataError, describe, parquet_files, stdlib_files, text_files
from jax_huginn.data.sources.split import split_files


def corpus(
    config: DataConfig, report: Callable[[str], None] = lambda line: None
) -> tuple[list[CorpusFile], list[CorpusFile]]:
    """Training and held-out files of a `data` section; the second list is empty only if the config asks for none.

    Args:
        report: called with a line that says how much is read, and what is left out.
    """
    left_out: Counter[str] = Counter()
    training, held_out = _stdlib(config) if config.source == "stdlib" else _local(config, left_out)
    report(describe(training, held_out, left_out))
    return training, held_out


def _stdlib(config: DataConfig) -> tuple[list[CorpusFile], list[CorpusFile]]:
    if config.validation_path:
        raise DataError(f"data.validation_path={config.validation_path!r} needs data.source=text or parquet")
    return split_files(stdlib_files(), config.validation_fraction)


def _local(config: DataConfig, left_out: Counter[str]) -> tuple[list[CorpusFile], list[CorpusFile]]:
    find = parquet_files if config.source == "parquet" else text_files
    if not config.path:
        raise DataError(f"data.source={config.source} needs --data.path, a folder or a file")
    files = find(config.path, left_out=left_out)
    if not config.validation_path:
        return split_files(files, config.validation_fraction)
    held_out = find(config.validation_path, "data.validation_path")
    held_out_paths = {file.path.resolve() for file in held_out}  # the one folder may lie within the other
    files = [file for file in files if file.path.resolve() not in held_out_paths]
    if not files:
        raise DataError(f"data.validation_path={config.validation_path!r} holds out all of data.path={config.path!r}")
    return files, held_out
