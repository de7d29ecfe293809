"""The trained tokenizer is lossless, deterministic and loads with AutoTokenizer; bad ones are named in one line."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from jax_huginn.data.sources.files import DataError, stdlib_files
from jax_huginn.data.sources.text import Document
from jax_huginn.data.tokenizer import (
    BOS,
    EOS,
    PAD,
    Encoder,
    load_tokenizer,
    save_tokenizer,
    token_bytes,
    tokenizer_digest,
    train_tokenizer,
    vocabulary_size,
)

CORPUS = [file.path.read_text() for file in stdlib_files() if file.relative_path.startswith("json/")]
TEXTS = [
    CORPUS[0],
    "",
    " ",
    "  two leading, two trailing  ",
    "tabs\t\tand\r\nnewlines\n\n\n    indented",
    "Grüße, 世界! 🏳️‍🌈 \u0000 \ufeff \u2028 \ufffd e\u0301",
    "punctuation , does n't ' s move .",
    f"a document that quotes {BOS}, {EOS} and {PAD}",
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(CORPUS, 600)


@pytest.fixture(scope="module")
def folder(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "tokenizer"
    save_tokenizer(tokenizer, folder)
    return folder


def test_vocabulary_has_exactly_the_size_asked_for(tokenizer: PreTrainedTokenizerFast) -> None:
    assert vocabulary_size(tokenizer) == len(tokenizer) == 600
    assert [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id] == [0, 1, 2]
    with pytest.raises(DataError, match=r"model\.vocab_size=258 .* 259 or more"):
        train_tokenizer(CORPUS, 258)


def test_training_again_gives_the_same_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    again = train_tokenizer(iter(CORPUS), 600)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert tokenizer_digest(again) == tokenizer_digest(tokenizer)
    assert tokenizer_digest(train_tokenizer(CORPUS, 601)) != tokenizer_digest(tokenizer)


def test_a_tokenizer_of_ours_is_loaded_without_torch(folder: Path) -> None:
    line = f"import sys; from jax_huginn.data.tokenizer import load_tokenizer; load_tokenizer({str(folder)!r})"
    subprocess.run([sys.executable, "-c", line + "; assert 'torch' not in sys.modules"], check=True)


def test_saved_folder_loads_with_auto_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    for loaded in (AutoTokenizer.from_pretrained(folder), load_tokenizer(str(folder))):
        assert [loaded.bos_token, loaded.eos_token, loaded.pad_token] == [BOS, EOS, PAD]
        assert loaded.get_vocab() == tokenizer.get_vocab()
        for text in TEXTS[:-1]:
            ids = loaded.encode(text, add_special_tokens=False)
            assert ids == tokenizer.encode(text, add_special_tokens=False)
            assert loaded.decode(ids) == text
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"  # the name that transformers 4 knows


@pytest.mark.parametrize("text", TEXTS)
def test_documents_are_framed_lossless_and_counted_in_bytes(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = Encoder(tokenizer)([Document(text)])
    assert ids.dtype == np.int32
    assert (ids[0], ids[-1]) == (0, 1)
    assert not np.isin(ids[1:-1], [0, 1, 2]).any()  # quoted special tokens stay text
    assert tokenizer.decode(ids[1:-1].tolist()) == text
    counts = token_bytes(tokenizer, 1000)
    assert counts.shape == (1000,)
    assert counts.dtype == np.int32
    assert counts[ids].sum() == len(text.encode())
    assert counts[:3].sum() == 0
    assert counts[600:].sum() == 0


def test_documents_follow_each_other_and_parts_join(tokenizer: PreTrainedTokenizerFast) -> None:
    encode = Encoder(tokenizer)
    both = encode([Document("one\n"), Document("two\n")])
    np.testing.assert_array_equal(both, np.concatenate([encode([Document("one\n")]), encode([Document("two\n")])]))
    parts = [encode([Document("one\n", ends=False)]), encode([Document("two\n", begins=False)])]
    assert tokenizer.decode(np.concatenate(parts).tolist()) == f"{BOS}one\ntwo\n{EOS}"
    assert encode([]).shape == (0,)


@pytest.mark.parametrize("kind", ["Metaspace", "Prepend", "ByteLevel"])
def test_a_part_that_continues_a_document_gets_no_space(kind: str) -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    # One id for each word: of two words with one id, a saved tokenizer keeps either, by the order of its hash map.
    word = "Ġa" if kind == "ByteLevel" else "▁a"
    backend = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, word: 2, "a": 3}, unk_token="<s>"))
    if kind == "Prepend":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    elif kind == "Metaspace":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    encode = Encoder(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>"))
    assert encode([Document("a a a")]).tolist() == [0, 2, 2, 2, 1]
    parts = [Document("a", ends=False), Document(" a", begins=False, ends=False), Document("a a", begins=False)]
    assert encode(parts).tolist() == [0, 2, 2, 3, 2, 1]


def test_bad_tokenizers_are_named_in_one_line(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "tokenizer.json").write_text("{")
    for path in (str(tmp_path / "missing"), str(tmp_path), str(broken), "./neither/folder/nor/name"):
        with pytest.raises(DataError) as error:
            load_tokenizer(path)
        assert f"data.tokenizer={path!r}" in str(error.value)
        assert "\n" not in str(error.value)
    for name in ("bos_token", "eos_token"):
        lacking = tmp_path / name
        save_tokenizer(load_tokenizer(str(folder)), lacking)
        config = json.loads((lacking / "tokenizer_config.json").read_text())
        (lacking / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if k != name}))
        with pytest.raises(DataError, match=f"defines no {name[:3].upper()} token: set {name}"):
            load_tokenizer(str(lacking))


def test_missing_pad_is_eos(folder: Path, tmp_path: Path) -> None:
    save_tokenizer(load_tokenizer(str(folder)), tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(str(tmp_path)).pad_token_id == 1


def test_token_bytes_need_a_byte_level_tokenizer() -> None:
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "word": 2}, unk_token="<s>"))
    with pytest.raises(DataError, match="byte-level"):
        token_bytes(PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>"), 3)


def test_code_beside_a_tokenizer_neither_runs_nor_is_asked_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in every exported folder, whose config.json names modelling files."""
    save_tokenizer(train_tokenizer(["a tale of foxes"], 259), tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "unknown", "auto_map": {"AutoConfig": "code.Configuration"}}')
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Configuration: ...\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether code may run"))
    assert len(load_tokenizer(str(tmp_path))) == 259
    assert not (tmp_path / "ran").exists()
