"""Generation written out in NumPy: one token after the other, every recurrence of every token kept, nothing cached.

It recomputes what a policy of the cache means. At recurrence i, a new token reads of an earlier token s, which ran r_s

    full    recurrence min(i, r_s)
    mod     the last one up to r_s that equals i modulo the budget, or r_s
    last    recurrence r_s

and of itself i. Tokens of the prompt read each other as under full. The coda reads what earlier tokens left after their
last recurrence; only the predictions that a criterion tests within the prompt, whose tokens think side by side, read
them after recurrence min(i, r_s). With a warm start a new token's s_0 is the last state of the token before it, the
prompt's tokens have the fixed one. Dense models with one block in the coda.
"""

from typing import NamedTuple

import numpy as np

from jax_huginn.inference.exits import Exit
from jax_huginn.model import initializers
from jax_huginn.model.huginn import MoEHuginnModel
from jax_huginn.ops.rope import rope_table
from tests.test_exits import plain_exit


class Row(NamedTuple):
    tokens: list[int]
    steps: list[int]
    logprobs: list[float]
    prompt_steps: list[int]


class Plain:
    """The model of a batch of one, in NumPy; it holds what every token left behind."""

    def __init__(self, model: MoEHuginnModel, policy: str, budget: int, exit: Exit | None, warm_start: bool):
        self.model, self.policy, self.budget, self.exit = model, policy, budget, exit
        self.warm_start = warm_start
        config = model.config.model
        self.angles = rope_table(config.max_length, config.head_dim, config.rope_base)
        self.starts = np.asarray(initializers.fixed_state(0, config.max_length, config.width), np.float64)
        self.kept: list[dict] = []
        self.state = self.starts[0]
        self.steps: list[int] = []

    def seen(self, part: str, step: int, place: int, in_prompt: bool) -> int | None:
        ran = self.steps[place]
        if part != "core":
            return None if part == "prelude" else min(step, ran) if in_prompt else ran
        if self.policy == "last" and not in_prompt:
            return ran
        if self.policy == "mod" and not in_prompt:
            return max((j for j in range(1, ran + 1) if (step - j) % self.budget == 0), default=ran)
        return min(step, ran)

    def block(self, block, x, name: tuple[str, int], step: int | None, in_prompt: bool):
        """A sandwich block of the newest token; `step` is None in the prelude."""
        attn, model = block.attn, self.model.config.model
        place = len(self.steps)
        q, k, v = np.split(self.norm(block.norm_1, x) @ value(attn.w_qkv), 3)
        q, k, v = (part.reshape(model.heads, model.head_dim) for part in (q, k, v))
        q_bias, k_bias = value(attn.qk_bias)[:, 0]
        q, k = (self.rotate(part, place) for part in (q + q_bias, k + k_bias))
        self.kept[place][name, step] = k, v
        found = [self.kept[s][name, self.seen(name[0], step or 0, s, in_prompt)] for s in range(place)]
        keys, values = (np.stack(each) for each in zip(*found, (k, v), strict=True))
        weights = softmax(np.einsum("hk,lhk->hl", q, keys) / np.sqrt(model.head_dim))
        y = np.einsum("hl,lhk->hk", weights, values).ravel() @ value(attn.w_out)
        x = self.norm(block.norm_2, y + x)
        gate, up = np.split(self.norm(block.norm_3, x) @ value(block.mlp.w_fc), 2)
        return self.norm(block.norm_4, (gate / (1 + np.exp(-gate)) * up) @ value(block.mlp.w_proj) + x)

    def norm(self, norm, x):
        return x / np.sqrt(np.mean(x**2) + self.model.config.model.norm_eps) * value(norm.weight)

    def rotate(self, x, place: int):
        cos, sin = self.angles[place, :, 0], self.angles[place, :, 1]
        even, odd = x[:, 0::2], x[:, 1::2]
        return np.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1).reshape(x.shape)

    def think(self, token: int, in_prompt: bool, most: int) -> np.ndarray:
        """Log-probabilities of the token after this one, thought about for at most so many recurrences."""
        self.kept.append({})
        e = value(self.model.wte)[token] * np.sqrt(self.model.config.model.width)
        for i, block in enumerate(self.model.prelude):
            e = self.block(block, e, ("prelude", i), None, in_prompt)
        warm = self.warm_start and not in_prompt
        states, predictions = [self.state if warm else self.starts[len(self.steps)]], []
        for step in range(1, most + 1):
            x = np.concatenate([states[-1], e]) @ value(self.model.adapter)
            for i, block in enumerate(self.model.core):
                x = self.block(block, x, ("core", i), step, in_prompt)
            states.append(x)
            predictions.append(self.read(x, step, in_prompt))
            if self.exit and plain_exit(self.exit, np.array(states), np.exp(predictions)) == step:
                break
        last = self.read(states[-1], len(predictions), in_prompt=False)
        self.steps.append(len(predictions))
        self.state = states[-1]
        return last

    def read(self, state, step: int, in_prompt: bool) -> np.ndarray:
        y = self.norm(self.model.norm_f, state)
        for i, block in enumerate(self.model.coda):
            y = self.block(block, y, ("coda", i), step, in_prompt)
        logits = self.norm(self.model.norm_f, y) @ value(self.model.wte).T
        return logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()


def generate_plainly(
    model: MoEHuginnModel, prompt: list[int], max_new_tokens: int, recurrence: int, exit: Exit | None = None,
    policy: str = "full", budget: int = 0, warm_start: bool = False, limits: list[int] | None = None,
) -> Row:  # fmt: skip
    """Greedy; `limits[i]` bounds the recurrences of the position that gives token i, if it is not the prompt's."""
    plain = Plain(model, policy, budget, exit, warm_start)
    limits = limits or [recurrence] * (max_new_tokens + 1)
    log_p = np.zeros(0)
    for token in prompt:
        log_p = plain.think(token, True, recurrence)
    tokens, logprobs = [], []
    for limit in [*limits[1:], 1][:max_new_tokens]:
        tokens.append(int(log_p.argmax()))
        logprobs.append(float(log_p.max()))
        log_p = plain.think(tokens[-1], False, limit)
    last = len(prompt) - 1
    return Row(tokens, plain.steps[last : last + max_new_tokens], logprobs, plain.steps[: len(prompt)])


def value(parameter) -> np.ndarray:
    return np.asarray(parameter[...], np.float64)


def softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)
