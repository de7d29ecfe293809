"""The model as the evaluation harness wants it: `eval_tasks.language_model.LanguageModel` in JAX."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh

from eval_tasks.language_model import Reading, Score, Written
from jax_huginn.config.checks import UserError
from jax_huginn.inference.cache import Policy
from jax_huginn.inference.decode import generate
from jax_huginn.inference.exits import Exit
from jax_huginn.inference.programs import BY_ROW, DATA
from jax_huginn.inference.reading import read_with_exits
from jax_huginn.model import functional, initializers
from jax_huginn.model.huginn import MoEHuginnModel
from jax_huginn.parallel.mesh import REPLICATED, per_device

LENGTH_STEP = 64  # lengths are rounded up to multiples, so that few programs serve all batches
CHUNK = 128  # positions whose logits exist at once
NEW_TOKENS_STEP = 32  # the most new tokens of a batch are rounded up to multiples, likewise
TOKENS_PER_CALL = 4  # between two looks for stop strings: few are written in vain, and looking costs little


class _Predicted(NamedTuple):
    """The result of one batch."""

    log_p_T: Any
    """Log-probability of the target at every place."""
    best_T: Any
    """The most likely token there."""
    used_B: Any
    """Recurrences of all tokens of a row."""
    computed_B: Any
    """Recurrences that were computed for each of its tokens."""


class JaxLanguageModel:
    """Scores and generates with parameters in the type that they were loaded in.

    Padding follows a row's end, where causality hides it, and the initial state depends on the position alone, so rows
    are independent.

    Args:
        exit: by which every token ends its recurrences, at the latest at the depth that is asked for.
        policy: of the cache that generation reads, with `budget`; scoring reads texts whole, so it has `full` alone.
        devices: the rows of a batch are spread over them, and each has a copy of the weights; default: the one that
            holds the model.
    """

    def __init__(
        self,
        model: MoEHuginnModel,
        exit: Exit | None = None,
        policy: Policy = "full",
        budget: int = 0,
        devices: Sequence[Any] = (),
    ):
        self._model, self._exit, self._devices = model, exit, devices
        self._policy: Policy = policy
        self._budget = budget
        self.vocab_size, self.max_length = model.config.model.vocab_size, model.config.model.max_length
        self.device = jax.devices()[0].device_kind
        self.dtype, self.version = model.config.model.dtype, f"jax {jax.__version__}"
        self._width = model.config.model.width
        graphdef, self._params = functional.split(model)

        def predict(params, tokens_BS, length_B, place_T3, recurrence, state_SD):
            model = nnx.merge(graphdef, params)
            row_T, position_T, target_T = place_T3.T
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
            return _Predicted(log_p_T.ravel(), best_T.ravel(), used_B, jnp.broadcast_to(computed, used_B.shape))

        if len(devices) > 1:
            mesh = Mesh(np.array(devices), (DATA,))
            specs = REPLICATED, BY_ROW, BY_ROW, BY_ROW, REPLICATED, REPLICATED
            predict = per_device(predict, mesh, specs, BY_ROW)
        self._program = jax.jit(predict)

    def exiting(self, exit: Exit) -> JaxLanguageModel:
        """The same weights, with exits."""
        return JaxLanguageModel(self._model, exit, self._policy, self._budget, self._devices)

    def log_probabilities(self, readings: Sequence[Reading], recurrence: int) -> list[list[Score]]:
        """The last positions of a reading predict its continuation.

        Raises:
            UserError: with another policy than `full`.
        """
        if self._policy != "full":
            raise UserError(f"--cache.policy {self._policy} is for tasks that generate; this one scores whole texts")
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
            steps = (int(found.used_B[row]), int(found.computed_B[row]) * len(reading.tokens)) if self._exit else ()
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
    ) -> list[Written]:
        """Greedy, by the cached engine of `python -m jax_huginn.generate`.

        Raises:
            UserError: the cache does not fit.
        """
        asked = [row for row, most in enumerate(max_new_tokens) if most > 0]
        new: list[list[int]] = [[] for _ in prompts]

        def on_tokens(place: int, tokens: list[int]) -> int | None:
            row = asked[place]
            for count, token in enumerate(tokens, start=1):
                new[row].append(token)
                if len(new[row]) == max_new_tokens[row] or finished(row, new[row]):
                    return count
            return None

        if not asked:
            return [Written(tokens) for tokens in new]
        results, totals = generate(
            self._model, [prompts[row] for row in asked], recurrence=recurrence, exit=self._exit,
            max_new_tokens=-(-max(max_new_tokens) // NEW_TOKENS_STEP) * NEW_TOKENS_STEP, policy=self._policy,
            budget=self._budget, on_tokens=on_tokens, tokens_per_call=TOKENS_PER_CALL, devices=self._devices,
        )  # fmt: skip
        if any(result.finish_reason == "interrupted" for result in results):
            raise KeyboardInterrupt
        if self._exit is None:
            return [Written(tokens) for tokens in new]
        read = sum(len(prompts[row]) + len(new[row]) - 1 for row in asked)
        used = totals.prompt_used + sum(sum(result.steps[1:]) for result in results)
        shares = [(len(prompts[row]) + len(new[row]) - 1) / read if new[row] else 0 for row in range(len(prompts))]
        computed = totals.prompt_computed + totals.computed
        return [Written(tokens, used * share, computed * share) for tokens, share in zip(new, shares, strict=True)]

    def _predict(
        self, rows: Sequence[Sequence[int]], places: list[tuple[int, int, int]], recurrence: int
    ) -> _Predicted:
        """The predictions at every place, (row, position, target). Devices have equal numbers of rows and of places."""
        devices = max(len(self._devices), 1)
        share = _power_of_two(-(-len(rows) // devices))
        longest = -(-max(len(row) for row in rows) // LENGTH_STEP) * LENGTH_STEP
        tokens_BS = np.zeros((devices * share, min(longest, self.max_length)), np.int32)
        length_B = np.zeros(devices * share, np.int32)
        for i, row in enumerate(rows):
            tokens_BS[i, : len(row)], length_B[i] = row, len(row)
        device_T = np.array([row // share for row, _, _ in places])
        counts = np.bincount(device_T, minlength=devices)
        most = CHUNK * _power_of_two(-(-int(counts.max()) // CHUNK))
        # Places come row by row, so those of a device follow each other.
        index_T = np.concatenate([device * most + np.arange(count) for device, count in enumerate(counts)])
        place_T3 = np.zeros((devices * most, 3), np.int32)
        place_T3[index_T] = places
        place_T3[:, 0] %= share
        state_SD = initializers.fixed_state(0, tokens_BS.shape[1], self._width)
        found = self._program(self._params, tokens_BS, length_B, place_T3, np.int32(recurrence), state_SD)
        log_p_T, best_T, used_B, computed_B = jax.device_get(found)
        return _Predicted(log_p_T[index_T], best_T[index_T], used_B, computed_B)


def _power_of_two(number: int) -> int:
    """The smallest that is not less."""
    return 1 << (number - 1).bit_length()
