"""Texts written by a model: prompts become tokens, tokens become text, and stop strings end it.

`jax_huginn.inference` knows token ids only; this is the layer above it that the verb `generate` uses.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval_tasks.loading import encode, load_tokenizer
from jax_huginn.config.checks import UserError, require

if TYPE_CHECKING:
    from jax_huginn.inference import Drafts, Exit, Generated, Sampling, Totals
    from jax_huginn.inference.cache import Policy


@dataclass(frozen=True)
class Settings:
    """How texts are made, apart from their prompts."""

    max_new_tokens: int
    recurrence: int | None
    exit: "Exit | None"
    sampling: "Sampling"
    policy: "Policy"
    budget: int
    warm_start: bool
    drafts: "Drafts | None"
    seed: int
    stop: tuple[str, ...]


@dataclass
class Writer:
    """A model with its tokenizer."""

    model: Any
    tokenizer: Any
    stop_tokens: list[int]
    devices: list[Any]
    chat: bool
    """Prompts are messages in the tokenizer's chat template."""
    fsdp: int = 1
    """Devices that share a copy of the weights."""

    def encode(self, prompt: str, name: str, earlier: Sequence[dict[str, str]] = ()) -> list[int]:
        """Token ids of a prompt, called `name` in complaints, after the `earlier` messages of a chat."""
        require(bool(prompt), f"{name} is empty")
        require(_is_text(prompt), f"{name} is not valid Unicode text")
        if self.chat:
            messages = [*earlier, {"role": "user", "content": prompt}]
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            tokens = encode(self.tokenizer, text, name)
        else:
            bos = self.tokenizer.bos_token_id
            tokens = [bos] * (bos is not None) + encode(self.tokenizer, prompt, name)
        most = self.model.config.model.max_length
        require(len(tokens) < most, f"{name} has {len(tokens)} tokens; the model's context of {most} must leave room")
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def write(
        self, prompts: Sequence[list[int]], settings: Settings, seeds: Sequence[int], show: Callable[[str], None] | None
    ) -> "tuple[list[Generated], Totals, list[str]]":
        """Continue the prompts in one batch; their texts end before a stop string.

        Args:
            show: called with the first row's text, piece by piece, as it is made.
        """
        from jax_huginn.inference import generate

        texts = [Text(self.decode, settings.stop) for _ in prompts]

        def on_tokens(row: int, tokens: list[int]) -> int | None:
            kept = texts[row].add(tokens)
            if show is not None and row == 0:
                show(texts[row].unseen())
            return kept

        results, totals = generate(
            self.model, prompts, max_new_tokens=settings.max_new_tokens, recurrence=settings.recurrence,
            exit=settings.exit, policy=settings.policy, budget=settings.budget, warm_start=settings.warm_start,
            drafts=settings.drafts, sampling=settings.sampling, seeds=seeds, stop_tokens=self.stop_tokens,
            on_tokens=on_tokens, tokens_per_call=16 if show is None else 1, devices=self.devices,
            fsdp=self.fsdp,
        )  # fmt: skip
        for text, result in zip(texts, results, strict=True):
            if len(result.tokens) > len(text.tokens):  # interrupted before they were handed over
                text.add(result.tokens[len(text.tokens) :])
        if show is not None:
            show(texts[0].unseen(last=True))
        return results, totals, [text.text for text in texts]


class Text:
    """The text of one row as its tokens arrive."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str]):
        self.decode, self.stops = decode, stops
        self.tokens: list[int] = []
        self.text, self.shown = "", 0

    def add(self, tokens: Sequence[int]) -> int | None:
        """How many of these tokens it takes to reach a stop string, whose text is cut off; None if there is none."""
        before = len(self.tokens)
        self.tokens += tokens
        self.text = self.decode(self.tokens)
        if not any(stop in self.text for stop in self.stops):
            return None
        kept = next(
            count for count in range(1, len(tokens) + 1)
            if any(stop in self.decode(self.tokens[: before + count]) for stop in self.stops)
        )  # fmt: skip
        del self.tokens[before + kept :]
        self.text = self.decode(self.tokens)
        self.text = self.text[: min(self.text.index(stop) for stop in self.stops if stop in self.text)]
        return kept

    def unseen(self, last: bool = False) -> str:
        """The text since the last call, without an end that further tokens may change."""
        end = len(self.text)
        if not last:
            unfinished = len(self.text) - len(self.text.rstrip("\ufffd"))  # bytes of a character that is not whole
            begun = [
                size for stop in self.stops for size in range(1, len(stop)) if self.text.endswith(stop[:size])
            ]  # fmt: skip
            end = max(len(self.text) - max([unfinished, *begun]), self.shown)
        piece, self.shown = self.text[self.shown : end], end
        return piece


def open_writer(
    source_name: str,
    tokenizer_path: str | None = None,
    dtype: str | None = None,
    data: int = 1,
    fsdp: int = 1,
    plain: bool = False,
) -> Writer:
    """The model of a source and its tokenizer, ready to write.

    Args:
        tokenizer_path: of a source without a tokenizer, or in place of its own.
        dtype: to compute in; the model's own when not given.
        data: groups of devices that share the rows.
        fsdp: devices of a group, which share a copy of the weights. One of the two may be -1: all devices.
        plain: prompts are text even where the tokenizer has a chat template.

    Raises:
        UserError: something cannot be read, or does not fit.
    """
    import jax

    from jax_huginn.checkpoints.sources import load_for_inference, open_source
    from jax_huginn.inference.programs import mesh_of
    from jax_huginn.model.sharding import shardings
    from jax_huginn.parallel.mesh import available_devices

    source = open_source(source_name)
    path = tokenizer_path or source.tokenizer
    if path is None:
        raise UserError(f"--tokenizer_path is needed: {source.path} comes without a tokenizer")
    tokenizer, rows = load_tokenizer(str(path), "--tokenizer_path"), source.config.model.vocab_size
    if len(tokenizer) > rows:
        raise UserError(f"the tokenizer {path} has {len(tokenizer)} tokens, more than the model's {rows}")
    if "float64" in (dtype, source.config.model.dtype):
        jax.config.update("jax_enable_x64", True)
    devices = available_devices()
    groups = len(devices) // fsdp if data == -1 else data
    fsdp = len(devices) // groups if fsdp == -1 else fsdp
    asked = f"--parallel.data {data} and --parallel.fsdp {fsdp}"
    require(0 < groups * fsdp <= len(devices), f"{asked} do not fit the {len(devices)} device(s) here")
    devices = devices[: groups * fsdp]
    mesh = mesh_of(source.config, devices, fsdp)
    model = load_for_inference(source, dtype, mesh and (lambda target: shardings(target, mesh)))
    chat = bool(tokenizer.chat_template) and not plain
    return Writer(model, tokenizer, stop_tokens_of(source.path, tokenizer), devices, chat, fsdp)


def _is_text(text: str) -> bool:
    """Whether it holds no half of a surrogate pair, which neither UTF-8 nor a tokenizer can express."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def stop_tokens_of(source: Path, tokenizer: Any) -> list[int]:
    """EOS, and what a Hugging Face folder's generation_config.json adds, such as the end of a turn."""
    stops = {tokenizer.eos_token_id}
    try:
        more = json.loads((source / "generation_config.json").read_text(encoding="utf-8")).get("eos_token_id")
    except (OSError, ValueError, AttributeError):
        more = None
    return sorted(stops | {stop for stop in (more if isinstance(more, list) else [more]) if isinstance(stop, int)})


def sums(spent: "Sequence[Totals]") -> dict[str, Any]:
    """The totals of all batches; the cache is that of the largest."""
    every = [asdict(totals) for totals in spent]
    return {name: (max if name == "cache_bytes" else sum)(each[name] for each in every) for name in every[0]}


def summary(results: "Sequence[Generated]", spent: "Sequence[Totals]") -> str:
    """One line: speed, depth and cost; speed and computed recurrences are of all tokens but each text's first."""
    total = sums(spent)
    steps = [step for result in results for step in result.steps]
    decoded = total["tokens"] - total["rows"]
    parts = [f"{total['tokens']} tokens"]
    if decoded > 0:
        parts.append(f"{decoded / total['decode_seconds']:.1f} tokens/s")
    parts.append(f"mean steps {sum(steps) / max(len(steps), 1):.1f}")
    if decoded > 0:
        parts.append(f"computed {total['computed'] / decoded:.1f} a token")
    if total["drafted"] > 0:
        parts.append(f"{total['accepted'] / total['drafted']:.0%} of drafts accepted")
    parts.append(f"cache {total['cache_bytes'] / 1e6:.3g} MB")
    parts.append(f"prompt {total['prompt_seconds']:.2f} s")
    parts.append(f"compilation, apart, {total['compile_seconds']:.1f} s")
    return "; ".join(parts)
