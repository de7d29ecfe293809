"""The tokenizer that a preset names comes from the hub like its rows; rows in the cache train without it."""

import dataclasses
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import huggingface_hub.constants as hf
import pytest

from jax_huginn.config.presets import load_config
from jax_huginn.config.schema import ModelConfig
from jax_huginn.data.pipeline import Data, build_data
from jax_huginn.data.sources.files import DataError
from jax_huginn.data.tokenizer import save_tokenizer, train_tokenizer
from tests.hub.support import make_config, one_line, take
from tests.hub_server import MODEL, HubServer

ROOT = Path(__file__).parents[2]


def build(folder: Path, run: str = "run", report: Callable[[str], None] = lambda line: None, **data: Any) -> Data:
    config = dataclasses.replace(make_config(folder, **data), model=ModelConfig(vocab_size=300))
    return build_data(config, folder / run / "tokenizer", report=report)


@pytest.fixture
def served(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """A hub whose model has a tokenizer beside weights and code."""
    monkeypatch.setattr(hf, "HF_HUB_CACHE", str(tmp_path / "home"))
    save_tokenizer(train_tokenizer(["some text"], 300), tmp_path / "made")
    hub.model = {file.name: file.read_bytes() for file in (tmp_path / "made").iterdir()}
    described = b'{"model_type": "huginn_raven", "auto_map": {"AutoConfig": "code.Config"}}'
    hub.model |= {"config.json": described, "code.py": b"raise SystemExit", "model.safetensors": b"weights"}
    return hub


@pytest.fixture
def lose_network(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def lose() -> None:
        monkeypatch.setattr(hf, "ENDPOINT", "http://127.0.0.1:9")
        monkeypatch.setattr(hf, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/{revision}/{filename}")

    return lose


def test_every_preset_of_the_huginn_data_names_its_tokenizer() -> None:
    configs = [load_config(str(file)) for file in sorted((ROOT / "configs").glob("*.py"))]
    huginn = [config.data for config in configs if config.data.path == "tomg-group-umd/huginn-dataset"]
    assert len(huginn) == 3
    assert {data.tokenizer for data in huginn} == {"tomg-group-umd/huginn-0125"}


def test_it_is_fetched_alone_and_kept_for_the_next_run(
    served: HubServer, tmp_path: Path, lose_network: Callable[[], None]
) -> None:
    with closing((data := build(tmp_path, tokenizer=MODEL)).train):
        assert data.tokenizer is not None and data.token_bytes is not None
        assert data.tokenizer.decode(data.tokenizer.encode("some text")) == "some text"
    assert (tmp_path / "run/tokenizer/tokenizer.json").is_file()
    fetched = {request["url"].split("/")[-1] for request in served.requests if f"/{MODEL}/resolve/" in request["url"]}
    assert "tokenizer.json" in fetched and not fetched & {"config.json", "code.py", "model.safetensors"}
    lose_network()
    with closing(build(tmp_path, "other", tokenizer=MODEL).train):
        assert (tmp_path / "other/tokenizer/tokenizer.json").read_bytes() == (
            tmp_path / "run/tokenizer/tokenizer.json"
        ).read_bytes()


def test_rows_in_the_cache_train_without_a_network_and_the_run_says_what_it_lacks(
    served: HubServer, tmp_path: Path, expected: Any, lose_network: Callable[[], None]
) -> None:
    with closing((data := build(tmp_path)).train):
        take(data, 120)
    lose_network()
    lines: list[str] = []
    with closing((data := build(tmp_path, "later", lines.append, tokenizer=MODEL)).train):
        assert (take(data, 120) == expected[0]).all()
    assert data.tokenizer is None and data.token_bytes is None
    (warning,) = [line for line in lines if line.startswith("warning")]
    assert f"data.tokenizer='{MODEL}' cannot be fetched" in warning
    assert "no bits per byte" in warning and str(tmp_path / "later/tokenizer") in warning
    with pytest.raises(DataError) as error:  # text cannot be read without it
        build(tmp_path, "text", source="stdlib", tokenizer=MODEL)
    one_line(error, f"data.tokenizer='{MODEL}' cannot be fetched", "not in the Hugging Face cache")


def test_a_name_that_the_hub_does_not_know_is_one_line(served: HubServer, tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        build(tmp_path, tokenizer="owner/mdel")
    one_line(error, "data.tokenizer='owner/mdel' cannot be fetched: HTTP status 404")
