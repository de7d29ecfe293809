"""Held-out text of Python's standard library as the token rows of a model, for benchmarks of what it was trained on."""

from pathlib import Path
from typing import Any

import numpy as np

from eval_tasks.build import perplexity_pieces
from eval_tasks.loading import load_tokenizer
from jax_huginn.checkpoints.sources import load_for_inference, open_source
from jax_huginn.config.checks import UserError, require
from jax_huginn.data.tokenizer import token_bytes


def model_and_pieces(name: str, length: int, rows: int) -> tuple[Any, np.ndarray, np.ndarray]:
    """The model of a source, rows of `length` tokens with BOS (B,S), and the bytes of every token (V,).

    Each row is the beginning of a piece of a held-out file; the library is that of the running Python.
    """
    source = open_source(name)
    if source.tokenizer is None:
        raise UserError(f"{Path(name)} comes without a tokenizer")
    tokenizer = load_tokenizer(str(source.tokenizer), "SOURCE")
    texts = [tokenizer(piece["text"], add_special_tokens=False)["input_ids"] for piece in perplexity_pieces()]
    found = [[tokenizer.bos_token_id, *tokens][:length] for tokens in texts if len(tokens) + 1 >= length][:rows]
    require(len(found) == rows, f"{rows} pieces of {length} tokens are more than the {len(found)} there are")
    model = load_for_inference(source)
    return model, np.array(found, np.int32), token_bytes(tokenizer, model.config.model.vocab_size)
