"""The digest by which the weights of a model are known, without reading a tensor."""

from collections.abc import Iterator
from pathlib import Path

from jax_huginn.checkpoints.step_folders import CHECKSUMS


def files_of_weights(path: Path) -> Iterator[Path]:
    """The files of a step folder, a `.pth` or a Hugging Face folder by whose content its weights are known."""
    if path.is_file():
        yield path
    elif (path / CHECKSUMS).is_file():  # the digests of all its files
        yield path / CHECKSUMS
    else:
        yield from path.glob("*.safetensors")
        yield path / "config.json"
