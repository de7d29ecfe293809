"""The model as the evaluation harness wants it: `eval_tasks.language_model.LanguageModel` in PyTorch."""

from collections.abc import Callable, Sequence

import torch

from eval_tasks.language_model import Reading, Score

from .generate import greedy
from .model import MoEHuginnModel


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
        longest = max(len(reading.tokens) for reading in readings)
        tokens_BS = torch.tensor([[*each.tokens, *[0] * (longest - len(each.tokens))] for each in readings])
        output_BSD = self.model.hidden(tokens_BS.to(self.model.device), (recurrence, 0))[0]
        return [
            [self._score(output_SD[: len(reading.tokens)], continuation) for continuation in reading.continuations]
            for output_SD, reading in zip(output_BSD, readings, strict=True)
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
    ) -> list[list[int]]:
        return greedy(self.model, prompts, (recurrence, 0), max_new_tokens, finished)
