"""The model as the evaluation harness wants it: `eval_tasks.language_model.LanguageModel` in JAX."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from eval_tasks.language_model import Reading, Score
from jax_huginn.config.checks import UserError
from jax_huginn.inference.exits import Exit
from jax_huginn.inference.reading import read_with_exits
from jax_huginn.model import functional, initializers
from jax_huginn.model.huginn import MoEHuginnModel

LENGTH_STEP = 64  # lengths are rounded up to multiples, so that few programs serve all batches
CHUNK = 128  # positions whose logits exist at once


class _Predicted(NamedTuple):
    """The result of one batch."""

    log_p_T: jax.Array
    """Log-probability of the target at every place."""
    best_T: jax.Array
    """The most likely token there."""
    used_B: jax.Array
    """Recurrences of all tokens of a row."""
    computed: jax.Array
    """Recurrences that were computed for each token."""


class JaxLanguageModel:
    """Scores and generates on the default device, with parameters in the type that they were loaded in.

    Padding follows a row's end, where causality hides it, and the initial state depends on the position alone, so rows
    are independent.

    Args:
        exit: by which every token ends its recurrences, at the latest at the depth that is asked for; it scores only.
    """

    def __init__(self, model: MoEHuginnModel, exit: Exit | None = None):
        self._model, self._exit = model, exit
        self.vocab_size, self.max_length = model.config.model.vocab_size, model.config.model.max_length
        self.device = jax.devices()[0].device_kind
        self.dtype, self.version = model.config.model.dtype, f"jax {jax.__version__}"
        self._width = model.config.model.width
        graphdef, self._params = functional.split(model)

        @jax.jit
        def predict(params, tokens_BS, length_B, row_T, position_T, target_T, recurrence, state_SD):
            model = nnx.merge(graphdef, params)
            if exit is None:
                y_BSD = model.hidden(tokens_BS, recurrence, 0, state_SD).y_BSD
                used_B, computed = length_B * recurrence, recurrence
            else:
                y_BSD, steps_BS, computed = read_with_exits(model, exit, recurrence, tokens_BS, length_B, state_SD)
                used_B = steps_BS.sum(axis=1)
            y_TD = y_BSD[row_T, position_T]

            def chunk(y_sD, target_s):
                logits_sV = model.head(y_sD)
                log_p_s = jax.nn.log_softmax(logits_sV)[jnp.arange(CHUNK), target_s]
                return log_p_s, logits_sV.argmax(axis=-1)

            chunked = y_TD.reshape(-1, CHUNK, y_TD.shape[-1]), target_T.reshape(-1, CHUNK)
            log_p_T, best_T = lax.map(lambda inputs: chunk(*inputs), chunked)
            return _Predicted(log_p_T.ravel(), best_T.ravel(), used_B, computed)

        self._program = predict

    def exiting(self, exit: Exit) -> JaxLanguageModel:
        """The same weights, with exits."""
        return JaxLanguageModel(self._model, exit)

    def log_probabilities(self, readings: Sequence[Reading], recurrence: int) -> list[list[Score]]:
        """The last positions of a reading predict its continuation."""
        places = [
            (row, len(reading.tokens) - len(continuation) + i, token)
            for row, reading in enumerate(readings)
            for continuation in reading.continuations
            for i, token in enumerate(continuation)
        ]
        found = self._predict([reading.tokens for reading in readings], places, recurrence)
        scored = zip(places, found.log_p_T.tolist(), found.best_T.tolist(), strict=True)
        scores = []
        for row, reading in enumerate(readings):
            steps = (int(found.used_B[row]), int(found.computed) * len(reading.tokens)) if self._exit else ()
            scores.append([])
            for continuation in reading.continuations:
                tokens = [next(scored) for _ in continuation]
                hits = all(best == target for (_, _, target), _, best in tokens)
                scores[-1].append(Score(tuple(log_p for _, log_p, _ in tokens), hits, *steps))
        return scores

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: Sequence[int],
        recurrence: int,
        finished: Callable[[int, list[int]], bool],
    ) -> list[list[int]]:
        """Greedy, without a cache: every new token costs a whole forward pass.

        Raises:
            UserError: with exits.
        """
        if self._exit is not None:
            raise UserError("with --exit only likelihoods are scored, and this task generates")
        new: list[list[int]] = [[] for _ in prompts]
        running = list(range(len(prompts)))

        def fits(row: int) -> bool:
            return len(new[row]) < max_new_tokens[row] and len(prompts[row]) + len(new[row]) < self.max_length

        while running := [row for row in running if fits(row)]:
            rows = [[*prompts[row], *new[row]] for row in running]
            places = [(i, len(tokens) - 1, 0) for i, tokens in enumerate(rows)]
            for row, token in zip(running, self._predict(rows, places, recurrence).best_T.tolist(), strict=True):
                new[row].append(token)
            running = [row for row in running if not finished(row, new[row])]
        return new

    def _predict(
        self, rows: Sequence[Sequence[int]], places: list[tuple[int, int, int]], recurrence: int
    ) -> _Predicted:
        """The predictions at every place, (row, position, target)."""
        longest = -(-max(len(row) for row in rows) // LENGTH_STEP) * LENGTH_STEP
        tokens_BS = np.zeros((1 << (len(rows) - 1).bit_length(), min(longest, self.max_length)), np.int32)
        for i, row in enumerate(rows):
            tokens_BS[i, : len(row)] = row
        places_T3 = np.zeros((CHUNK << (-(-len(places) // CHUNK) - 1).bit_length(), 3), np.int32)
        places_T3[: len(places)] = places
        state_SD = initializers.fixed_state(0, tokens_BS.shape[1], self._width)
        length_B = np.array([len(row) for row in rows] + [0] * (len(tokens_BS) - len(rows)), np.int32)
        found = self._program(self._params, tokens_BS, length_B, *places_T3.T, np.int32(recurrence), state_SD)
        log_p_T, best_T, used_B, computed = jax.device_get(found)
        return _Predicted(log_p_T[: len(places)], best_T[: len(places)], used_B, computed)
