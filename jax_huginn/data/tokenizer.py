"""Tokenizers: training a byte-level BPE, single characters, loading any Hugging Face tokenizer, encoding documents."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jax_huginn.data.sources.files import DataError
from jax_huginn.data.sources.hub_tokenizer import fetch_tokenizer
from jax_huginn.data.sources.text import Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = "<|begin_text|>", "<|end_text|>", "<|pad|>"
CHARACTERS_AT_ONCE = 2**20
GENERIC = "PreTrainedTokenizerFast"  # the class that stands for nothing but its tokenizer.json
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


def character_tokenizer(alphabet: str, separator: str) -> "PreTrainedTokenizerFast":
    """A tokenizer with one token for each character, whose id is its index; `separator` is BOS, EOS and PAD.

    Encoding a character outside the alphabet fails, rather than leave it out.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({character: index for index, character in enumerate(alphabet)}))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=separator,
        eos_token=separator,
        pad_token=separator,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(path_or_name: str, report: Callable[[str], None] = print) -> "PreTrainedTokenizerFast":
    """Load the tokenizer of a folder or of a model on the hub; if it has no PAD, EOS is used.

    Args:
        report: called with a line for each try after which the hub is asked again.

    Raises:
        UnreachableError: the hub, which has it, does not answer.
        DataError: it cannot be loaded, or has no BOS or EOS.
    """
    folder = Path(path_or_name).expanduser()
    folder = folder if folder.exists() else fetch_tokenizer(path_or_name, report)
    try:
        tokenizer = _loader(folder).from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # OSError, KeyError, ImportError, ...; tokenizers raises a bare Exception
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"data.tokenizer={path_or_name!r} holds no tokenizer that can be loaded: {reason}") from None
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


def _loader(folder: Path) -> Any:
    """The class that loads the tokenizer of a folder. `AutoTokenizer` imports PyTorch where that is installed, seconds
    of every start, so a tokenizer that `save_tokenizer` wrote is loaded without it."""
    try:
        named = json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"]
    except (OSError, ValueError, KeyError, TypeError):  # AutoTokenizer looks elsewhere, or says what is wrong
        named = None
    if named == GENERIC:
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast
    from transformers import AutoTokenizer

    return AutoTokenizer


def save_tokenizer(tokenizer: "PreTrainedTokenizerFast", folder: Path) -> None:
    """Write a folder that `AutoTokenizer` loads; `tokenizer.json` is written last, so its presence means success."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        tokenizer.save_pretrained(name)
        config_path = Path(name, "tokenizer_config.json")
        config = json.loads(config_path.read_text())
        if config.get("tokenizer_class") == "TokenizersBackend":  # unknown to transformers before 5
            config["tokenizer_class"] = GENERIC
            config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        for path in sorted(Path(name).iterdir(), key=lambda path: path.name == "tokenizer.json"):
            if path.is_dir():
                shutil.copytree(path, folder / path.name, dirs_exist_ok=True)
            else:
                os.replace(path, folder / path.name)


def vocabulary_size(tokenizer: "PreTrainedTokenizerFast") -> int:
    """One more than the highest token id: the rows that an embedding needs."""
    return max(tokenizer.get_vocab().values()) + 1


def tokenizer_digest(tokenizer: "PreTrainedTokenizerFast") -> str:
    """A short hash of all that decides which tokens a text becomes: vocabulary, merges, normalisation, splitting."""
    settings = _settings(tokenizer)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in settings["model"].get("merges", ())]
    added = [(token["id"], token["content"], token["special"]) for token in settings["added_tokens"]]
    decisive = [
        tokenizer.get_vocab(),
        merges,  # written as "a b" or ["a", "b"], depending on the library's version
        added,
        [settings[name] for name in ("normalizer", "pre_tokenizer")],
        [tokenizer.bos_token_id, tokenizer.eos_token_id],
    ]
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]


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
    """Encodes documents as one sequence of tokens, `BOS text EOS BOS text EOS ...`.

    A part that continues a document gets no space in front, which many tokenizers put before a text's first word.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast") -> None:
        from tokenizers import Tokenizer

        # A copy without truncation, which encodes "<|end_text|>" in a document as text, not as EOS.
        settings = _settings(tokenizer)
        self._of_beginnings, self._of_rest = (
            Tokenizer.from_str(json.dumps(each)) for each in (settings, _without_prefix(settings))
        )
        for backend in (self._of_beginnings, self._of_rest):
            backend.no_truncation()
            backend.no_padding()
            backend.encode_special_tokens = True
        self._bos = np.array([tokenizer.bos_token_id], np.int32)
        self._eos = np.array([tokenizer.eos_token_id], np.int32)

    def __call__(self, documents: Sequence[Document]) -> np.ndarray:
        """Tokens (N,) int32."""
        parts = [np.zeros(0, np.int32)]
        for batch in _batches(documents):
            for document, ids in zip(batch, self._ids(batch), strict=True):
                parts += [self._bos] if document.begins else []
                parts.append(ids)
                parts += [self._eos] if document.ends else []
        return np.concatenate(parts)

    def _ids(self, documents: Sequence[Document]) -> list[np.ndarray]:
        """The tokens of each text."""
        ids: dict[int, np.ndarray] = {}
        for backend, begins in ((self._of_beginnings, True), (self._of_rest, False)):
            chosen = [index for index, document in enumerate(documents) if document.begins == begins]
            texts = [documents[index].text for index in chosen]
            for index, encoding in zip(chosen, backend.encode_batch_fast(texts, add_special_tokens=False), strict=True):
                ids[index] = np.asarray(encoding.ids, np.int32)
        return [ids[index] for index in range(len(documents))]


def _batches(documents: Sequence[Document]) -> Iterator[list[Document]]:
    """Documents in groups of about `CHARACTERS_AT_ONCE`: encoding takes over a hundred bytes for each character."""
    batch: list[Document] = []
    held = 0
    for document in documents:
        batch.append(document)
        held += len(document.text)
        if held >= CHARACTERS_AT_ONCE:
            yield batch
            batch, held = [], 0
    yield batch


def _without_prefix(settings: Any) -> Any:
    """A tokenizer's settings without what puts a space before a text."""
    if isinstance(settings, list):
        kept = [each for each in settings if not (isinstance(each, dict) and each.get("type") == "Prepend")]
        return [_without_prefix(each) for each in kept]
    if not isinstance(settings, dict):
        return settings
    changed = {
        name: None if isinstance(each, dict) and each.get("type") == "Prepend" else _without_prefix(each)
        for name, each in settings.items()
        if name in ("normalizer", "normalizers", "pre_tokenizer", "pretokenizers")
    }
    if settings.get("type") == "Metaspace":
        changed["prepend_scheme"] = "never"
    if "add_prefix_space" in settings and settings.get("type") == "ByteLevel":
        changed["add_prefix_space"] = False
    return settings | changed
