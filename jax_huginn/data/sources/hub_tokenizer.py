"""The files of a tokenizer on the Hugging Face hub, and no others: no weights, and no code that would run."""

import re
import time
from collections.abc import Callable
from pathlib import Path

from jax_huginn.data.sources.download import Patience, UnreachableError
from jax_huginn.data.sources.files import DataError
from jax_huginn.data.sources.hub import LISTING_ATTEMPTS, NAME

FILES = ["tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.jinja"]


def fetch_tokenizer(name: str, report: Callable[[str], None]) -> Path:
    """The folder of the tokenizer of the model `name`, fetched into the Hugging Face cache unless it is there.

    Raises:
        UnreachableError: the hub does not answer, and the cache lacks it.
        DataError: no such model there.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    what = f"data.tokenizer={name!r}"
    if not re.fullmatch(f"({NAME}/)?{NAME}", name):
        raise DataError(f"{what} is neither a tokenizer folder nor the name of a model on the hub")

    def fetch() -> Path:
        try:
            return Path(snapshot_download(name, allow_patterns=FILES))
        except LocalEntryNotFoundError as error:
            raise error.__cause__ or error from None  # what kept it from the hub

    try:
        return Patience(time.sleep, report, LISTING_ATTEMPTS).until_done(what, fetch)
    except UnreachableError as error:
        raise UnreachableError(f"{error}, and it is not in the Hugging Face cache") from None
