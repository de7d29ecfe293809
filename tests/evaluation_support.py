"""Shared by the tests of evaluation: a small model, and a tokenizer of bytes."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from torch_reference import MoEHuginnConfig, MoEHuginnModel

BOS, EOS, PAD = 0, 1, 2
CONFIG = MoEHuginnConfig(
    n_embd=32,
    num_attention_heads=2,
    num_key_value_heads=2,
    intermediate_size=48,
    padded_vocab_size=264,
    block_size=64,
    n_layers_in_prelude=1,
    n_layers_in_recurrent_block=1,
    n_layers_in_coda=1,
    mean_recurrence=4,
    mean_backprop_depth=2,
    num_experts=4,
    moe_k=2,
    moe_intermediate_size=16,
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, three special tokens, and one merge that a question's end may fall into."""
    alphabet = ["<bos>", "<eos>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "()"]
    inner = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, [("(", ")")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


def lively_model() -> MoEHuginnModel:
    """In float64, so that rounding cannot hide behind a tolerance, and of weights at which nothing is neutral."""
    model = MoEHuginnModel(CONFIG, seed=2).double()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith((".proj.weight", ".w_down.weight")):
                weight.mul_(5)
            elif "router" in name:
                weight.mul_(10)
    return model.eval()
