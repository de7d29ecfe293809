"""The model as the evaluation harness wants it: `eval_tasks.language_model.LanguageModel` in PyTorch."""

import itertools
from collections.abc import Callable, Sequence

import torch

from eval_tasks.language_model import Reading, Score, Written

from .cache import Cache
from .generate import greedy
from .model import MoEHuginnModel

WORTH_SHARING = 32  # tokens; for fewer, a second pass costs more than it saves


class TorchLanguageModel:
    """Scores and generates without gradients, on the model's own device.

    Padding follows a row's end, where causality hides it, and the initial state depends on the position alone, so rows
    are independent.
    """

    def __init__(self, model: MoEHuginnModel):
        self.model = model
        self.vocab_size, self.max_length = model.config.padded_vocab_size, model.config.block_size
        self.device = str(model.device)
        self.dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        self.version = f"torch {torch.__version__}"

    @torch.no_grad()
    def log_probabilities(self, readings: Sequence[Reading], recurrence: int) -> list[list[Score]]:
        """What all readings begin with, such as the examples of a few-shot task, is read once."""
        texts, cache = [reading.tokens for reading in readings], Cache(self.model, (recurrence, 0))
        predicting = max(len(continuation) for reading in readings for continuation in reading.continuations)
        alike = itertools.takewhile(lambda tokens: len(set(tokens)) == 1, zip(*texts, strict=False))
        shared = min(len(list(alike)), min(map(len, texts)) - predicting)
        if len(texts) > 1 and shared >= WORTH_SHARING:
            cache.read([texts[0][:shared]])
            texts = [text[shared:] for text in texts]
        output_BSD = cache.read(texts, keep=False)
        return [
            [self._score(output_SD[: len(text)], continuation) for continuation in reading.continuations]
            for output_SD, text, reading in zip(output_BSD, texts, readings, strict=True)
        ]

    def _score(self, output_SD: torch.Tensor, continuation: Sequence[int]) -> Score:
        """The last positions predict the continuation; only their logits are ever made."""
        logits_TV = self.model.unembed(output_SD[-len(continuation) :])
        target_T = torch.tensor(continuation, device=logits_TV.device)
        log_p_T = logits_TV.log_softmax(dim=-1).gather(1, target_T[:, None])[:, 0]
        return Score(tuple(log_p_T.tolist()), bool((logits_TV.argmax(dim=-1) == target_T).all()))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: Sequence[int],
        recurrence: int,
        finished: Callable[[int, list[int]], bool],
    ) -> list[Written]:
        rows = greedy(self.model, prompts, (recurrence, 0), max_new_tokens, finished)
        return [Written(row) for row in rows]
