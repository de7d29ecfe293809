"""Tokenizers: training a byte-level BPE, loading any Hugging Face tokenizer, encoding documents."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jax_huginn.data.sources.files import DataError
from jax_huginn.data.sources.text import Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = "<|begin_text|>", "<|end_text|>", "<|pad|>"
ALPHABET = 256  # one token for every byte, so that every text can be encoded


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> "PreTrainedTokenizerFast":
    """Train a byte-level BPE of `vocab_size` tokens, including BOS, EOS and PAD (ids 0, 1, 2); lossless on any UTF-8.

    Uses GPT-2's splitting regex: on Python sources it learns indentation as tokens, and the GPT-4 regex and two made
    for code were within 3 % of its bytes per token at 2048 and 8192 tokens. Training is deterministic. The vocabulary
    is smaller than requested only if the texts have too few pairs to merge.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    least = ALPHABET + len((BOS, EOS, PAD))
    if vocab_size < least:
        raise DataError(f"model.vocab_size={vocab_size} is too small to train a tokenizer: it needs {least} or more")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=BOS, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def load_tokenizer(path_or_name: str) -> "PreTrainedTokenizerFast":
    """Load the tokenizer of a folder or Hugging Face name; if it has no PAD, EOS is used.

    Raises:
        DataError: it cannot be loaded, or has no BOS or EOS.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path_or_name)
    except Exception as error:  # OSError, KeyError, ImportError, ...; tokenizers raises a bare Exception
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"data.tokenizer={path_or_name!r} is neither a tokenizer folder nor a name that can be fetched: {reason}"
        ) from None
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise DataError(f"data.tokenizer={path_or_name!r} has no tokenizer.json (a fast tokenizer): name one that has")
    for name in ("bos", "eos"):
        if getattr(tokenizer, f"{name}_token_id") is None:
            raise DataError(
                f"data.tokenizer={path_or_name!r} defines no {name.upper()} token: set {name}_token in its "
                "tokenizer_config.json"
            )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def save_tokenizer(tokenizer: "PreTrainedTokenizerFast", folder: Path) -> None:
    """Write a folder that `AutoTokenizer` loads; `tokenizer.json` is written last, so its presence means success."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        tokenizer.save_pretrained(name)
        config_path = Path(name, "tokenizer_config.json")
        config = json.loads(config_path.read_text())
        if config.get("tokenizer_class") == "TokenizersBackend":  # unknown to transformers before 5
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
            config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        for path in sorted(Path(name).iterdir(), key=lambda path: path.name == "tokenizer.json"):
            if path.is_dir():
                shutil.copytree(path, folder / path.name, dirs_exist_ok=True)
            else:
                os.replace(path, folder / path.name)


def vocabulary_size(tokenizer: "PreTrainedTokenizerFast") -> int:
    """One more than the highest token id: the rows that an embedding needs."""
    return max(tokenizer.get_vocab().values()) + 1


def vocabulary_digest(tokenizer: "PreTrainedTokenizerFast") -> str:
    """A short hash of all tokens and their ids."""
    return hashlib.sha256(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()).hexdigest()[:16]


def _settings(tokenizer: "PreTrainedTokenizerFast") -> dict[str, Any]:
    return json.loads(tokenizer.backend_tokenizer.to_str())


def is_byte_level(tokenizer: "PreTrainedTokenizerFast") -> bool:
    """Whether each character of a token's name represents one byte (GPT-2's alphabet)."""
    decoder = _settings(tokenizer)["decoder"] or {}
    return "ByteLevel" in [part.get("type") for part in (decoder, *decoder.get("decoders", ()))]


def token_bytes(tokenizer: "PreTrainedTokenizerFast", vocab_size: int) -> np.ndarray:
    """UTF-8 bytes represented by each token, (V,) int32; 0 for special and unused tokens.

    Their sum over a text's tokens is its length in bytes, which makes losses comparable between tokenizers (bits per
    byte).

    Raises:
        DataError: the tokenizer is not byte-level, so its tokens have no byte count.
    """
    if not is_byte_level(tokenizer):
        raise DataError("bits per byte need a byte-level BPE tokenizer, and this is not one")
    lengths = np.zeros(vocab_size, np.int32)
    for token, index in tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False).items():
        lengths[index] = len(token)
    for token in _settings(tokenizer)["added_tokens"]:
        lengths[token["id"]] = 0 if token["special"] else len(token["content"].encode())
    return lengths


class Encoder:
    """Encodes documents as one sequence of tokens, `BOS text EOS BOS text EOS ...`."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast") -> None:
        from tokenizers import Tokenizer

        # A copy without truncation, which encodes "<|end_text|>" in a document as text, not as EOS.
        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True
        self._bos = np.array([tokenizer.bos_token_id], np.int32)
        self._eos = np.array([tokenizer.eos_token_id], np.int32)

    def __call__(self, documents: Sequence[Document]) -> np.ndarray:
        """Tokens (N,) int32."""
        texts = [document.text for document in documents]
        parts = [np.zeros(0, np.int32)]
        for document, encoding in zip(
            documents, self._backend.encode_batch_fast(texts, add_special_tokens=False), strict=True
        ):
            parts += [self._bos] if document.begins else []
            parts.append(np.asarray(encoding.ids, np.int32))
            parts += [self._eos] if document.ends else []
        return np.concatenate(parts)
