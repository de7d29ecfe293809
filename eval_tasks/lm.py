"""A language model as lm-eval sees it, whichever framework runs it.

Training documents are `BOS text EOS`, so BOS precedes every context. Requests are batched by length. A score depends
neither on the batch size nor on the request's neighbours, beyond rounding: `LanguageModel` promises independent rows.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from eval_tasks.cache import AnswerCache
from eval_tasks.language_model import LanguageModel, Reading, Score
from eval_tasks.loading import encode
from eval_tasks.progress import Progress
from jax_huginn.config.checks import UserError

Request = tuple[Any, list[int], list[int]]  # anything (lm-eval's own), context tokens, continuation tokens
MAX_NEW_TOKENS = 256  # for a task that names no limit: lm-eval's default

# Generation settings that leave greedy decoding as it is, and the value at which the others do.
_IRRELEVANT = {
    "until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p", "min_p", "use_cache", "early_stopping",
}  # fmt: skip
_NEUTRAL = {
    "num_beams": 1, "repetition_penalty": 1, "length_penalty": 1, "no_repeat_ngram_size": 0, "presence_penalty": 0,
    "frequency_penalty": 0, "num_return_sequences": 1, "min_new_tokens": 0,
}  # fmt: skip


class HuginnLM(TemplateLM):
    """Scores and generates with `model` at `recurrence` recurrences; what `cache` knows is not asked again."""

    def __init__(
        self, model: LanguageModel, tokenizer: Any, recurrence: int, batch_size: int, cache: AnswerCache | None = None
    ):
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.recurrence = recurrence
        self.batch_size = batch_size
        self.cache = cache or AnswerCache(None, {})
        self.notes: Counter[str] = Counter()
        """What was shortened to fit the model, and how often."""
        self.steps = dict.fromkeys(("tokens", "used", "computed"), 0.0)
        """Of a model whose tokens exit: tokens read and written, recurrences used and computed for them."""

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """BOS, which begins every document."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    # ---- Text ----

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokens of the text alone, whatever `add_special_tokens` says: BOS is added later, once."""
        return encode(self.tokenizer, string)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The template that `--apply_chat_template` uses, for lm-eval's records."""
        return self.tokenizer.get_chat_template() if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def _with_bos(self, tokens: list[int]) -> list[int]:
        """BOS and the tokens; a chat template may have begun with BOS already."""
        return tokens if tokens[:1] == [self.prefix_token_id] else [self.prefix_token_id, *tokens]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        context_tokens, continuation_tokens = super()._encode_pair(context, continuation)
        if not continuation_tokens:  # the tokenizer merged it into the context's end, as "(" + ")" into "()"
            context_tokens, continuation_tokens = self.tok_encode(context), self.tok_encode(continuation)
        return self._with_bos(context_tokens), continuation_tokens

    def _decode(self, tokens: list[int], stops: Sequence[str]) -> str:
        """The text before the first stop string, without special tokens. A stop string may be a special token."""
        text = self.tokenizer.decode(tokens, skip_special_tokens=False)
        text = text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]
        for token in set(tokens) & set(self.tokenizer.all_special_ids):
            text = text.replace(self.tokenizer.decode([token], skip_special_tokens=False), "")
        return text

    # ---- Scores ----

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)  # no bar for tokenizing, which takes no time

    def _loglikelihood_tokens(self, requests: Sequence[Request], **kwargs: Any) -> list[tuple[float, bool]]:
        """(log-probability of the continuation in nats, whether it is the greedy one) of each request."""
        return [(sum(score.log_probabilities), score.greedy) for score in self.scores(requests)]

    def scores(self, requests: Sequence[Request]) -> list[Score]:
        """The score of each request's continuation.

        A context that is too long loses its left end, which is noted. Requests whose input is the same, such as the
        one-token choices of one question, are read once.
        """
        longest = self.model.max_length
        scores: dict[int, Score] = {}
        read: dict[tuple[int, ...], Score] = {}  # input -> one of its scores
        readers: dict[tuple[int, ...], list[int]] = defaultdict(list)  # input -> the requests that it scores
        for index, (_, context, continuation) in enumerate(requests):
            if len(continuation) > longest:
                raise UserError(f"a continuation of {len(continuation)} tokens is longer than the model's {longest}")
            tokens = (context + continuation)[:-1]
            if len(tokens) > longest:
                self.notes[f"contexts lost their left end to fit the model's {longest} tokens"] += 1
            kept = tuple(tokens[-longest:])
            if known := self.cache.get(["score", kept, continuation]):
                read[kept] = scores[index] = Score(tuple(known[0]), *known[1:])
            else:
                readers[kept].append(index)

        inputs = sorted(readers, key=lambda tokens: (-len(tokens), tokens))
        progress = Progress("scoring", len(inputs))
        for batch in _batches(inputs, self.batch_size):
            readings = [Reading(tokens, tuple(tuple(requests[i][2]) for i in readers[tokens])) for tokens in batch]
            for tokens, found in zip(batch, self.model.log_probabilities(readings, self.recurrence), strict=True):
                scores |= zip(readers[tokens], found, strict=True)
                read[tokens] = found[0]
                for index, score in zip(readers[tokens], found, strict=True):
                    answer = [score.log_probabilities, score.greedy]
                    if score.used is not None:
                        answer += [score.used, score.computed]
                    self.cache.put(["score", tokens, requests[index][2]], answer)
            self.cache.flush()
            progress.update(len(batch))
        progress.close()
        for tokens, score in read.items():
            if score.used is not None and score.computed is not None:
                self._count(len(tokens), score.used, score.computed)
        return [scores[index] for index in range(len(requests))]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text after BOS, in nats; longer texts in disjoint windows of max_length."""
        windows: list[Request] = []
        owners = []
        for owner, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.model.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += score
        return totals

    # ---- Text to be written ----

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy text up to the first stop string, EOS or the limit.

        The limit is the task's, or less where prompt and answer would not fit the model, which is noted: no prompt is
        ever cut.
        """
        asked: list[tuple[str, dict[str, Any]]] = [(request.args[0], *request.args[1:]) for request in requests]
        prompts = [self._with_bos(self.tok_encode(text)) for text, _ in asked]
        options = [_greedy_options(given) for _, given in asked]
        limits = [self._limit(prompt, option["max_gen_toks"]) for prompt, option in zip(prompts, options, strict=True)]
        stops = [[stop for stop in option["until"] if stop] for option in options]

        keys = [["text", *each] for each in zip(prompts, limits, stops, strict=True)]
        answers = {index: known for index, key in enumerate(keys) if (known := self.cache.get(key)) is not None}
        order = sorted(set(range(len(requests))) - answers.keys(), key=lambda index: (-len(prompts[index]), index))
        progress = Progress("generating", len(order))
        for batch in _batches(order, self.batch_size):

            def finished(row: int, new: list[int], batch: list[int] = batch) -> bool:
                text = self.tokenizer.decode(new, skip_special_tokens=False)
                return new[-1] == self.eot_token_id or any(stop in text for stop in stops[batch[row]])

            rows = self.model.generate(
                [prompts[index] for index in batch], [limits[index] for index in batch], self.recurrence, finished
            )
            for index, row in zip(batch, rows, strict=True):
                answers[index] = [self._decode(row.tokens, stops[index])]
                if row.used is not None:  # the last new token is never read
                    answers[index] += [len(prompts[index]) + len(row.tokens) - 1, row.used, row.computed]
                self.cache.put(keys[index], answers[index])
            self.cache.flush()
            progress.update(len(batch))
        progress.close()
        for _, *steps in answers.values():
            self._count(*steps)
        return [answers[index][0] for index in range(len(requests))]

    def _count(self, tokens: int = 0, used: float = 0, computed: float = 0) -> None:
        for kind, number in zip(self.steps, (tokens, used, computed), strict=True):
            self.steps[kind] += number

    def _limit(self, prompt: list[int], wanted: int) -> int:
        room = self.model.max_length - len(prompt)
        if room < min(wanted, 1):
            raise UserError(
                f"a prompt of {len(prompt)} tokens leaves no room for an answer in the model's {self.model.max_length}"
            )
        if wanted > room:
            self.notes["answers had less room than the task allows, so that their prompts stay whole"] += 1
        return min(wanted, room)


def _greedy_options(given: dict[str, Any]) -> dict[str, Any]:
    """A request's generation settings; raises UserError for one that asks for more than greedy decoding."""
    options: dict[str, Any] = dict(normalize_gen_kwargs(given, MAX_NEW_TOKENS))
    if options["do_sample"]:
        raise UserError("the task wants sampled text, but this generates greedily")
    for name, value in options.items():
        if name not in _IRRELEVANT and (name not in _NEUTRAL or value not in (None, _NEUTRAL[name])):
            raise UserError(f"the task wants {name}={value!r}, which greedy decoding does not have")
    if options["max_gen_toks"] < 0:
        raise UserError(f"the task wants {options['max_gen_toks']} new tokens")
    return options


def _batches(items: list[Any], size: int) -> Iterator[list[Any]]:
    return (items[i : i + size] for i in range(0, len(items), size))
