"""From configuration to batches: disjoint splits, shifted labels, exact resumption through Orbax, one-line errors."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jax_huginn.config.schema import Config, DataConfig, ModelConfig, TrainConfig, ValidationConfig
from jax_huginn.data.batches import TrainBatches
from jax_huginn.data.pipeline import Data, build_data
from jax_huginn.data.resume import whole_position
from jax_huginn.data.rows import IGNORE
from jax_huginn.data.sources.files import DataError, stdlib_files, text_files
from jax_huginn.data.sources.split import split_files

S, B, V = 64, 4, 512
REPOSITORY = Path(__file__).resolve().parent.parent


def make_config(
    path: Path, source: str = "text", seed: int = 0, batches: int = 3, vocab: int = V, **data: Any
) -> Config:
    return Config(
        model=ModelConfig(vocab_size=vocab),
        train=TrainConfig(batch_size=B, sequence_length=S, seed=seed),
        data=DataConfig(source=source, path=str(path), **{"validation_fraction": 0.2, "shuffle_window": 8} | data),  # pyright: ignore[reportArgumentType]
        validation=ValidationConfig(sequences=batches * B),
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty files of the standard library; every line ends with its file's name, so that batches tell their files."""
    folder = tmp_path_factory.mktemp("corpus")
    for index, file in enumerate(stdlib_files()[:40]):
        text = file.path.read_text()[:6000].replace("\n", f"  # file{index:03}\n")
        (folder / f"file{index:03}.py").write_text(text + f"# file{index:03}")
    return folder


@pytest.fixture(scope="module")
def tokenizer_dir(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "tokenizer"
    build_data(make_config(corpus), folder)
    return folder


@pytest.fixture(scope="module")
def rows_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    rng = np.random.default_rng(0)
    for index in range(10):
        rows = rng.integers(0, V, (12, S + 1)).tolist()
        pq.write_table(pa.table({"input_ids": pa.array(rows, pa.list_(pa.int32()))}), folder / f"{index}.parquet")
    return folder


def take(data: Data, count: int) -> list[dict[str, np.ndarray]]:
    return [next(data.train) for _ in range(count)]


def assert_equal(left: list[dict[str, np.ndarray]], right: list[dict[str, np.ndarray]]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a["tokens"], b["tokens"])
        np.testing.assert_array_equal(a["labels"], b["labels"])


def digest(batches: list[dict[str, np.ndarray]]) -> str:
    return hashlib.sha256(
        b"".join(batch["tokens"].tobytes() + batch["labels"].tobytes() for batch in batches)
    ).hexdigest()


def files_in(data: Data, batches: list[dict[str, np.ndarray]]) -> set[str]:
    assert data.tokenizer is not None
    text = " ".join(str(data.tokenizer.decode(row.tolist())) for batch in batches for row in batch["tokens"])
    return {f"file{index:03}.py" for index in range(40) if f"# file{index:03}\n" in text}


def test_labels_are_the_next_tokens(corpus: Path, tokenizer_dir: Path) -> None:
    data = build_data(make_config(corpus), tokenizer_dir)
    for batch in [*take(data, 20), *data.validation]:
        assert batch["tokens"].shape == batch["labels"].shape == (B, S)
        assert batch["tokens"].dtype == batch["labels"].dtype == np.int32
        np.testing.assert_array_equal(batch["tokens"][:, 1:], batch["labels"][:, :-1])
        assert batch["tokens"].min() >= 0
        assert batch["labels"].max() < V
    data.train.close()


def test_rows_follow_each_other_without_losing_a_label(corpus: Path, tokenizer_dir: Path) -> None:
    data = build_data(make_config(corpus, streams=1, shuffle_window=1), tokenizer_dir)
    batches = take(data, 70)
    data.train.close()
    tokens = np.concatenate([batch["tokens"] for batch in batches]).reshape(-1)
    labels = np.concatenate([batch["labels"] for batch in batches]).reshape(-1)
    np.testing.assert_array_equal(tokens[1:], labels[:-1])
    assert data.tokenizer is not None
    bos, eos = str(data.tokenizer.bos_token), str(data.tokenizer.eos_token)
    whole = str(data.tokenizer.decode(tokens.tolist())).removeprefix(bos).split(eos + bos)[:-1]
    known = {file.path.read_text() for file in split_files(text_files(str(corpus)), 0.2)[0]}
    assert len(whole) > 4
    assert set(whole) <= known


def test_validation_and_training_share_no_file(corpus: Path, tokenizer_dir: Path) -> None:
    data = build_data(make_config(corpus, batches=1000), tokenizer_dir)
    training, held_out = split_files(text_files(str(corpus)), 0.2)
    trained = files_in(data, take(data, 600))  # several epochs
    data.train.close()
    validated = files_in(data, data.validation)
    assert trained == {file.relative_path for file in training}
    assert validated == {file.relative_path for file in held_out}


def test_validation_is_fixed_and_spread_over_files(corpus: Path, tokenizer_dir: Path) -> None:
    data, other = (build_data(make_config(corpus, seed=seed), tokenizer_dir) for seed in (0, 1))
    assert len(data.validation) == 3
    assert_equal(data.validation, other.validation)
    assert not np.array_equal(next(data.train)["tokens"], next(other.train)["tokens"])
    assert len(files_in(data, data.validation)) >= 3
    for each in (data, other):
        each.train.close()


def test_a_small_held_out_share_is_one_padded_batch(tmp_path: Path, tokenizer_dir: Path) -> None:
    (tmp_path / "train.txt").write_text("training text\n" * 500)
    (tmp_path / "validation").mkdir()
    (tmp_path / "validation" / "a.txt").write_text("short")
    config = make_config(tmp_path, validation_path=str(tmp_path / "validation"), tokenizer=str(tokenizer_dir))
    data = build_data(config, tmp_path / "tokenizer")
    (batch,) = data.validation
    assert data.tokenizer is not None
    ids = [0, *data.tokenizer.encode("short", add_special_tokens=False), 1]
    counted = batch["labels"] != IGNORE
    assert batch["labels"][counted].tolist() == ids[1:]
    assert batch["tokens"][counted].tolist() == ids[:-1]
    assert batch["tokens"].shape == (B, S)


def test_no_validation_is_asked_for_by_a_fraction_of_zero(corpus: Path, tokenizer_dir: Path) -> None:
    assert build_data(make_config(corpus, validation_fraction=0.0), tokenizer_dir).validation == []


def test_tokenizer_is_trained_on_training_files_and_kept_for_resuming(corpus: Path, tmp_path: Path) -> None:
    marker = "zzqqxxjjzzqqxxjj"
    for index in range(20):
        (tmp_path / f"{index}.txt").write_text("plain words of training text\n" * 20)
    _, held_out = split_files(text_files(str(tmp_path)), 0.2)
    for file in held_out:
        file.path.write_text(f"{marker}\n" * 500)
    run = tmp_path.parent / f"{tmp_path.name}_run"
    data = build_data(make_config(tmp_path), run / "tokenizer")
    assert data.tokenizer is not None
    assert len(data.tokenizer.encode(marker)) == len(marker)  # never seen, so nothing was merged
    assert data.token_bytes is not None
    assert data.token_bytes.shape == (V,)
    assert data.token_bytes[data.tokenizer.encode(marker)].sum() == len(marker)
    saved = (run / "tokenizer" / "tokenizer.json").read_bytes()
    again = build_data(make_config(corpus), run / "tokenizer")  # other text, yet the saved tokenizer stays
    assert again.tokenizer is not None
    assert again.tokenizer.get_vocab() == data.tokenizer.get_vocab()
    assert (run / "tokenizer" / "tokenizer.json").read_bytes() == saved
    copied = build_data(make_config(corpus, tokenizer=str(run / "tokenizer")), run / "copy")
    assert copied.tokenizer is not None
    assert (run / "copy" / "tokenizer.json").exists()


def test_resuming_through_orbax_gives_the_very_next_batches(corpus: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    data = build_data(make_config(corpus), tokenizer_dir)
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        for step in (1, 2, 3):
            take(data, 7)
            position = whole_position([data.train.get_state()])
            manager.save(step, args=ocp.args.Composite(data=ocp.args.JsonSave(position)))  # pyright: ignore
        manager.wait_until_finished()
        expected = take(data, 10)
        resumed = build_data(make_config(corpus), tokenizer_dir)
        take(resumed, 2)
        restored = manager.restore(3, args=ocp.args.Composite(data=ocp.args.JsonRestore()))  # pyright: ignore
        resumed.train.set_state(restored["data"])
        assert resumed.train.get_state()["rows"] == 21 * B
        assert_equal(take(resumed, 10), expected)
        for each in (data, resumed):
            each.train.close()


def test_another_process_reads_the_same_batches(corpus: Path, tokenizer_dir: Path) -> None:
    data = build_data(make_config(corpus), tokenizer_dir)
    script = (
        f"import sys; sys.path.insert(0, {str(REPOSITORY)!r})\n"
        "from pathlib import Path\n"
        "from tests.test_data_pipeline import build_data, digest, make_config, take\n"
        f"data = build_data(make_config(Path({str(corpus)!r}), prefetch=1), Path({str(tokenizer_dir)!r}))\n"
        "print(digest(take(data, 30)), digest(data.validation)); data.train.close()\n"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7", "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1].split() == [digest(take(data, 30)), digest(data.validation)]
    data.train.close()


def test_importing_the_package_is_light_and_free_of_jax() -> None:
    script = (
        f"import sys; sys.path.insert(0, {str(REPOSITORY)!r})\n"
        "import jax_huginn.data.pipeline\n"
        "print([m for m in ('jax', 'torch', 'grain', 'transformers', 'tokenizers', 'pyarrow') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "[]", result.stderr


def test_parquet_rows_become_batches(rows_folder: Path, tmp_path: Path) -> None:
    data = build_data(make_config(rows_folder, source="parquet"), tmp_path / "tokenizer")
    assert data.tokenizer is None
    assert data.token_bytes is None
    assert not (tmp_path / "tokenizer").exists()
    known = {
        np.asarray(row, np.int32).tobytes(): path.name
        for path in rows_folder.iterdir()
        for row in pq.read_table(path)["input_ids"].to_pylist()
    }
    names = []
    for batches in (take(data, 100), data.validation):
        rows = [np.append(t, n[-1]) for b in batches for t, n in zip(b["tokens"], b["labels"], strict=True)]
        names.append({known[row.astype(np.int32).tobytes()] for row in rows})
    assert names[0]
    assert names[1]
    assert not names[0] & names[1]
    assert len(names[0] | names[1]) == 10
    data.train.close()


def test_parquet_validation_path(rows_folder: Path, tmp_path: Path) -> None:
    held_out = rows_folder / "3.parquet"
    data = build_data(make_config(rows_folder, source="parquet", batches=3, validation_path=str(held_out)), tmp_path)
    got = {row.tobytes() for batch in data.validation for row in batch["tokens"]}
    rows = np.asarray(pq.read_table(held_out)["input_ids"].to_pylist(), np.int32)
    assert got == {row[:-1].tobytes() for row in rows}


def test_errors_of_the_background_thread_reach_the_reader(rows_folder: Path, tmp_path: Path) -> None:
    held_out = str(tmp_path / "good.parquet")
    config = make_config(rows_folder, source="parquet", vocab=V - 100, validation_path=held_out, bad_rows="stop")
    good = pa.table({"input_ids": pa.array([[1] * (S + 1)] * B, pa.list_(pa.int32()))})
    pq.write_table(good, tmp_path / "good.parquet")
    data = build_data(config, tmp_path)
    with pytest.raises(DataError, match=rf"\.parquet row \d+ has token \d+, outside \[0, {V - 100}\)"):
        next(data.train)
    data.train.close()


@pytest.mark.parametrize("given", [True, False])
def test_a_tokenizer_larger_than_the_model_is_an_error(corpus: Path, tokenizer_dir: Path, given: bool) -> None:
    config = make_config(corpus, vocab=V - 1, tokenizer=str(tokenizer_dir) if given else "")
    with pytest.raises(DataError) as error:
        build_data(config, tokenizer_dir.parent / "other" if given else tokenizer_dir)
    assert f"{V} tokens" in str(error.value)
    assert f"model.vocab_size={V - 1}" in str(error.value)
    assert "\n" not in str(error.value)


def test_looking_at_the_position_is_no_checkpoint():
    """The hub's cache keeps what the last checkpoint reads; the loop looks at the position before every batch."""
    saved, state = [], {"streams": [[0] * 6], "skipped": [[0] * 4]}
    hub: Any = SimpleNamespace(saved=saved.append)
    batches: Any = SimpleNamespace(get_state=lambda: state)
    train = TrainBatches(batches, hub)
    assert train.position == state
    assert saved == []
    assert train.get_state() == state
    assert saved == [state]
