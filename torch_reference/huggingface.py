"""The twin as a Transformers model. Every exported folder holds this file and those that it imports, so that

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True).generate(..., num_steps=32)

works where this project is not installed. Keys and values are cached for every recurrence; a row's left padding changes
nothing in it, since positions, and with them the initial state, are counted from its first token.
"""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .cache import context_of
from .config import MoEHuginnConfig, model_config_of
from .initial_state import initial_state  # noqa: F401  Transformers 4 copies only files that this one names
from .layers import Context, at_least_float32
from .model import IGNORE, MoEHuginnModel
from .moe import MoE  # noqa: F401  likewise


class HuginnConfig(PretrainedConfig):
    """All that config.json says, as attributes."""

    model_type = "moe_huginn"
    attribute_map = {"max_position_embeddings": "block_size"}  # noqa: RUF012  where lm-eval looks for the longest text

    def __init__(self, **values: Any):
        layers = sum(values.get(f"n_layers_in_{part}", 0) for part in ("prelude", "recurrent_block", "coda"))
        given = {"tie_word_embeddings": True, "use_cache": True, "num_hidden_layers": layers, **values}
        super().__init__(**given)
        self.use_cache = given["use_cache"]  # Transformers 5 takes it for a setting of generation

    def shape(self) -> MoEHuginnConfig:
        """Raises ValueError for what the model cannot represent."""
        return MoEHuginnConfig.from_model_config(model_config_of({**self.to_dict(), "model_type": self.model_type}))


class RavenConfig(HuginnConfig):
    """A dense model's, in the words of huginn-0125."""

    model_type = "huginn_raven"

    def __init__(self, **values: Any):  # without one, Transformers 5 makes one that is not the parent's
        super().__init__(**values)


class HuginnForCausalLM(PreTrainedModel, GenerationMixin):
    """`MoEHuginnModel` with a cache, attention masks, and labels that Transformers shifts."""

    _twin: MoEHuginnModel
    transformer: nn.ModuleDict
    config_class = HuginnConfig
    base_model_prefix = "transformer"
    _supports_sdpa = True
    _no_split_modules = ["SandwichBlock"]  # noqa: RUF012  Transformers wants lists
    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"freqs_cis"]  # noqa: RUF012

    def __init__(self, config: HuginnConfig):
        super().__init__(config)
        twin = MoEHuginnModel(config.shape(), seed=None)
        self.__dict__["_twin"] = twin  # no submodule: the parameters have the names of the files
        self.transformer = twin.transformer
        self.lm_head = nn.Linear(twin.config.n_embd, twin.config.padded_vocab_size, bias=False)
        if not self.lm_head.weight.is_meta:  # a model that is not about to be loaded
            twin.reset_parameters(seed=0)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: they are drawn with the whole model."""

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer["wte"]

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.transformer["wte"] = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        num_steps: int | tuple[int, int] | None = None,
        logits_to_keep: int | Tensor = 0,
        labels: Tensor | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, S, V) of the tokens after those in the cache, and the loss where there are labels.

        attention_mask (B, all tokens, cached ones first), 0 for padding; position_ids follow from it; num_steps
        recurrences, of which the last ones carry gradients, or (without, with gradient); labels are `input_ids`, -100
        where they do not count.
        """
        if inputs_embeds is not None:
            raise ValueError("inputs_embeds cannot be given: the embedding has no other way in than tokens")
        keep = self.config.use_cache and not self.training if use_cache is None else use_cache
        kv = self._cache(past_key_values if cache is None else cache, keep, self._steps(num_steps))
        context = self._context(input_ids, attention_mask, kv)
        output_BSD, out = self._twin.hidden(input_ids, self._steps(num_steps), context=context)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        logits = at_least_float32(self.lm_head(output_BSD if isinstance(kept, int) else output_BSD[:, kept]))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE)
            if out.moe is not None:
                shape = self._twin.config
                loss = loss + shape.balance_weight * out.moe.balance_loss + shape.z_weight * out.moe.z_loss
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=kv)  # pyright: ignore[reportCallIssue]

    def _steps(self, num_steps: int | tuple[int, int] | None) -> tuple[int, int]:
        steps: int | tuple[int, int] = self.config.mean_recurrence if num_steps is None else num_steps
        if not isinstance(steps, int):
            n, k = steps
            return n, k
        gradient = min(steps, self._twin.config.mean_backprop_depth)
        return steps - gradient, gradient

    def _cache(self, given: Any, keep: bool, steps: tuple[int, int]) -> DynamicCache | None:
        """The cache to use, which grows by one layer for each attention of each recurrence; None without one."""
        if given is None or (isinstance(given, DynamicCache) and given.get_seq_length() == 0):
            return DynamicCache() if keep else None  # not the given one: it may have a layer for each of the weights'
        shape = self._twin.config
        layers = shape.n_layers_in_prelude + sum(steps) * shape.n_layers_in_recurrent_block + shape.n_layers_in_coda
        if not isinstance(given, DynamicCache):
            raise ValueError(f"a {type(given).__name__} cannot hold every recurrence: give a DynamicCache, or none")
        if len(given.layers) != layers:
            raise ValueError(f"num_steps={sum(steps)} needs a cache of {layers} layers, not {len(given.layers)}")
        return given

    def _context(self, input_ids: Tensor, attention_mask: Tensor | None, kv: DynamicCache | None) -> Context:
        past = 0 if kv is None else kv.get_seq_length()
        B, S = input_ids.shape
        if attention_mask is None:
            attention_mask = torch.ones(B, past + S)
        real_BL = attention_mask.to(input_ids.device).bool()
        if tuple(real_BL.shape) != (B, past + S):
            raise ValueError(f"attention_mask has shape {tuple(real_BL.shape)}, not {(B, past + S)}")
        layers = itertools.count()
        return context_of(real_BL, S, lambda k, v: (k, v) if kv is None else kv.update(k, v, next(layers)))


class RavenForCausalLM(HuginnForCausalLM):
    """A dense model."""

    config_class = RavenConfig
