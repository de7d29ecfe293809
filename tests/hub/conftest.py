"""A loopback hub for one test, and the rows expected from its files."""

from collections.abc import Callable, Iterator
from contextlib import closing

import huggingface_hub.constants as hf
import numpy as np
import pytest
from huggingface_hub.utils import close_session

from jax_huginn.data.sources import download
from tests.hub.support import FILES, build, take
from tests.hub_server import HubServer, serving


@pytest.fixture
def point_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[HubServer], None]:
    """Points huggingface_hub at a server, online, with short pauses."""

    def point(hub: HubServer) -> None:
        monkeypatch.setattr(hf, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hf, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(
            hf, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(download, "FIRST_PAUSE", 0.005)
        monkeypatch.setattr(download, "LONGEST_PAUSE", 0.02)
        close_session()

    return point


@pytest.fixture
def hub(point_at: Callable[[HubServer], None]) -> Iterator[HubServer]:
    with serving(FILES) as server:
        point_at(server)
        yield server
    close_session()


@pytest.fixture(scope="session")
def expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[np.ndarray, np.ndarray]:
    """What the same files give from a local folder: 120 batches, a few epochs; and the validation's tokens."""
    folder = tmp_path_factory.mktemp("local")
    for path, content in FILES.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(content)
    local = {"source": "parquet", "path": str(folder / "train"), "validation_path": str(folder / "val")}
    with closing((data := build(folder, **local)).train):
        return take(data, 120), np.stack([batch["tokens"] for batch in data.validation])
