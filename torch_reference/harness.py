"""The model as lm-eval sees it.

Documents of training are `BOS text EOS`, so BOS stands before every context. Requests are right-padded and batched
by length: padding behind a causal model's text changes nothing, and the initial state depends on the position
alone, so a score depends neither on the batch size nor on the request's neighbours (beyond rounding).
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from torch_reference.generate import greedy
from torch_reference.model import MoEHuginnModel

Request = tuple[Any, list[int], list[int]]  # whatever the caller wants, context tokens, continuation tokens
MAX_NEW_TOKENS = 256  # of a task that names no limit, lm-eval's own default


class UnsupportedRequestError(ValueError):
    """A task asks for what this model cannot do; one line."""


class HuginnLM(TemplateLM):
    """Scores and generates at `recurrence` recurrences, without gradients, on the model's own device."""

    def __init__(self, model: MoEHuginnModel, tokenizer: Any, recurrence: int, batch_size: int):
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.num_steps = (recurrence, 0)
        self.batch_size = batch_size
        self.max_length = model.config.block_size
        self._device = model.device

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """BOS, which begins every document."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokens of the text alone, whatever `add_special_tokens` says: BOS is put where it belongs, once."""
        return self.tokenizer.encode(string, add_special_tokens=False)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        context_tokens, continuation_tokens = super()._encode_pair(context, continuation)
        if not continuation_tokens:  # the tokenizer merged it into the context's end, as "(" + ")" into "()"
            context_tokens, continuation_tokens = self.tok_encode(context), self.tok_encode(continuation)
        return [self.prefix_token_id, *context_tokens], continuation_tokens

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)  # no bar for tokenizing, which takes no time

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests: Sequence[Request], **kwargs: Any) -> list[tuple[float, bool]]:
        """(log-probability of the continuation in nats, whether greedy decoding would produce it) of each request.

        A context that is too long loses its left end. Requests that the model reads alike, such as the one-token
        choices of one question, are read once.
        """
        readers = defaultdict(list)  # what the model reads -> the requests scored by it
        for index, (_, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise UnsupportedRequestError(
                    f"a continuation of {len(continuation)} tokens is longer than the model's {self.max_length}"
                )
            readers[tuple((context + continuation)[-(self.max_length + 1) : -1])].append(index)

        scores: dict[int, tuple[float, bool]] = {}
        inputs = sorted(readers, key=lambda tokens: (-len(tokens), tokens))
        progress = tqdm(total=len(inputs), desc="scoring", disable=None)  # shown on a terminal
        for batch in _batches(inputs, self.batch_size):
            output_BSD = self.model.hidden(self._pad(batch), self.num_steps)[0]
            for output_SD, tokens in zip(output_BSD, batch, strict=True):
                for index in readers[tokens]:
                    scores[index] = self._score(output_SD[: len(tokens)], requests[index][2])
            progress.update(len(batch))
        progress.close()
        return [scores[index] for index in range(len(requests))]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text after BOS, in nats; longer texts in disjoint windows of block_size."""
        windows: list[Request] = []
        owners = []
        for owner, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += score
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy text up to the first stop string, EOS or the task's limit; sampling tasks are refused."""
        texts: dict[int, str] = {}
        order = sorted(range(len(requests)), key=lambda index: -len(requests[index].args[0]))
        progress = tqdm(total=len(order), desc="generating", disable=None)  # shown on a terminal
        for batch in _batches(order, self.batch_size):
            options: list[dict[str, Any]] = [
                dict(normalize_gen_kwargs(requests[index].args[1], MAX_NEW_TOKENS)) for index in batch
            ]
            if any(option["do_sample"] for option in options):
                raise UnsupportedRequestError("the task wants sampled text, but this generates greedily")
            limits = [min(int(option["max_gen_toks"]), self.max_length - 1) for option in options]
            stops = [[stop for stop in option["until"] if stop] for option in options]
            prompts = []
            for index, limit in zip(batch, limits, strict=True):
                prompt = [self.prefix_token_id, *self.tok_encode(requests[index].args[0])]
                prompts.append(prompt[-(self.max_length - limit) :])  # leave room for the answer

            def finished(row: int, new: list[int], limits=limits, stops=stops) -> bool:
                if len(new) >= limits[row] or new[-1] == self.eot_token_id:
                    return True
                return any(stop in self._decode(new) for stop in stops[row])

            rows = greedy(self.model, prompts, self.num_steps, max(limits), finished)
            for index, new, stop in zip(batch, rows, stops, strict=True):
                texts[index] = _cut(self._decode(new), stop)
            progress.update(len(batch))
        progress.close()
        return [texts[index] for index in range(len(requests))]

    def _score(self, output_SD: torch.Tensor, continuation: list[int]) -> tuple[float, bool]:
        """The last positions predict the continuation; only their logits are ever made."""
        logits = self.model.unembed(output_SD[-len(continuation) :])
        target = torch.tensor(continuation, device=logits.device)
        log_p = logits.log_softmax(dim=-1).gather(1, target[:, None]).sum()
        return log_p.item(), bool((logits.argmax(dim=-1) == target).all())

    def _pad(self, batch: Sequence[Sequence[int]]) -> torch.Tensor:
        longest = max(map(len, batch))
        return torch.tensor([[*tokens, *[0] * (longest - len(tokens))] for tokens in batch], device=self._device)

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


def _batches(items: list[Any], size: int) -> Iterator[list[Any]]:
    return (items[i : i + size] for i in range(0, len(items), size))


def _cut(text: str, stops: list[str]) -> str:
    """The text before the first stop string."""
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]
