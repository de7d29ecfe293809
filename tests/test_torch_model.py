"""The PyTorch twin is the model of its description, term by term."""

from dataclasses import replace

import pytest
import torch

from tests.torch_support import CORE, DENSE, INJECTION, KINDS, SEQUENCE, batch, gradients, perturbed
from torch_reference import MoEHuginnConfig, MoEHuginnConfig700M, MoEHuginnModel
from torch_reference.initial_state import initial_state

# ---- The whole model, written a second time, for one sequence, without a module ------------------------------------


def naive_logits(w: dict[str, torch.Tensor], c: MoEHuginnConfig, tokens: torch.Tensor, s: torch.Tensor, R: int):
    """The model's formulas, written out: (S, V) logits of tokens (S,) from the state s (S, D)."""

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + c.norm_eps).sqrt() * w[f"{name}.weight"]

    def swiglu(x, gate, up, down):
        gate = x @ gate.T
        return (gate * torch.sigmoid(gate) * (x @ up.T)) @ down.T

    def rope(x):  # (S, K), as multiplication of complex numbers
        angle = torch.arange(len(x))[:, None] / c.rope_base ** (torch.arange(0, c.head_dim, 2).double() / c.head_dim)
        return torch.view_as_real(
            torch.view_as_complex(x.view(len(x), -1, 2)) * torch.polar(angle * 0 + 1, angle)
        ).flatten(1)

    def attention(x, name):
        H, G, K = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        qkv, bias = x @ w[f"{name}.Wqkv.weight"].T, w[f"{name}.qk_bias"]
        heads = []
        for h in range(H):
            g = h // (H // G)
            q = rope(qkv[:, h * K : (h + 1) * K] + bias[0, 0, h])
            k = rope(qkv[:, (H + g) * K : (H + g + 1) * K] + bias[1, 0, h])
            v = qkv[:, (H + G + g) * K : (H + G + g + 1) * K]
            later = torch.ones(len(x), len(x)).triu(1) > 0
            heads.append((q @ k.T / K**0.5).masked_fill(later, -torch.inf).softmax(-1) @ v)
        return torch.cat(heads, -1) @ w[f"{name}.proj.weight"].T

    def moe(x, name):
        def expert(which):
            return swiglu(x, *(w[f"{name}.{which}.{part}.weight"] for part in ("w_gate", "w_up", "w_down")))

        logits = x @ w[f"{name}.router.weight"].T
        kept = logits >= logits.topk(c.moe_k).values[:, -1:]
        p = logits.masked_fill(~kept, -torch.inf).softmax(-1)
        return expert("shared_expert") + sum(
            p[:, [i]] * expert(f"specialized_experts.{i}") for i in range(c.num_experts)
        )

    def mlp(x, name):
        if f"{name}.moe.router.weight" in w:
            return moe(x, f"{name}.moe")
        gate, up = w[f"{name}.mlp.fc.weight"].chunk(2)
        return swiglu(x, gate, up, w[f"{name}.mlp.proj.weight"])

    def blocks(x, part, count):
        for i in range(count):
            name = f"transformer.{part}.{i}"
            x = norm(attention(norm(x, f"{name}.norm_1"), f"{name}.attn") + x, f"{name}.norm_2")
            x = norm(mlp(norm(x, f"{name}.norm_3"), name) + x, f"{name}.norm_4")
        return x

    e = blocks(w["transformer.wte.weight"][tokens] * c.n_embd**0.5, "prelude", c.n_layers_in_prelude)
    if "transformer.moe.router.weight" in w:
        e = norm(moe(e, "transformer.moe") + (e if c.moe_residual else 0), "transformer.moe_norm")
    for _ in range(R):
        s = blocks(
            torch.cat([s, e], -1) @ w["transformer.adapter.weight"].T, "core_block", c.n_layers_in_recurrent_block
        )
    y = blocks(norm(s, "transformer.ln_f"), "coda", c.n_layers_in_coda)
    return norm(y, "transformer.ln_f") @ w["transformer.wte.weight"].T


@KINDS
def test_logits_are_those_of_the_model_written_naively(config):
    model, tokens = perturbed(config), batch(config)
    state = torch.randn(2, SEQUENCE, config.n_embd, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    logits = model(tokens, num_steps=(2, 1), initial_state=state).logits
    for row in range(2):
        expected = naive_logits(model.state_dict(), config, tokens[row], state[row], R=3)
        assert (logits[row] - expected).norm() <= 1e-12 * expected.norm()


# ---- Names ------------------------------------------------------------------------------------------------------


def expected_names(config: MoEHuginnConfig) -> set[str]:
    experts = ["shared_expert", *(f"specialized_experts.{j}" for j in range(config.num_experts))]
    moe = ["router", *(f"{expert}.{w}" for expert in experts for w in ("w_gate", "w_up", "w_down"))]
    names = {f"transformer.{name}.weight" for name in ("wte", "adapter", "ln_f")}
    for part, count in (
        ("prelude", config.n_layers_in_prelude),
        ("core_block", config.n_layers_in_recurrent_block),
        ("coda", config.n_layers_in_coda),
    ):
        for i in range(count):
            block = f"transformer.{part}.{i}"
            names |= {f"{block}.norm_{n}.weight" for n in (1, 2, 3, 4)}
            names |= {f"{block}.attn.{name}" for name in ("Wqkv.weight", "qk_bias", "proj.weight")}
            if part == "core_block" and config.num_experts and config.moe_placement == "core":
                names |= {f"{block}.moe.{name}.weight" for name in moe}
            else:
                names |= {f"{block}.mlp.{name}.weight" for name in ("fc", "proj")}
    if config.num_experts and config.moe_placement == "injection":
        names |= {f"transformer.moe.{name}.weight" for name in moe} | {"transformer.moe_norm.weight"}
    return names


@KINDS
def test_state_dict_has_exactly_the_names_of_the_layout(config):
    assert set(MoEHuginnModel(config).state_dict()) == expected_names(config)


def test_parameter_counts_of_the_presets():
    large = {"n_embd": 5280, "num_attention_heads": 55, "num_key_value_heads": 55, "intermediate_size": 17920}
    huginn = replace(MoEHuginnConfig700M(), num_experts=0, **large)
    moe_3_8b = replace(MoEHuginnConfig700M(), moe_intermediate_size=1792, **large)
    for config, billions in ((MoEHuginnConfig700M(), 0.71), (huginn, 3.565), (moe_3_8b, 3.82)):
        with torch.device("meta"):
            model = MoEHuginnModel(config, seed=None)
        assert sum(weight.numel() for weight in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.006)


# ---- Recurrence and truncated backpropagation -----------------------------------------------------------------------


@KINDS
def test_gradients_are_truncated_after_k_recurrences(config):
    model, tokens = perturbed(config), batch(config)
    seen = []  # (whether gradients are on, the state) of every recurrence
    hook = model.transformer["adapter"].register_forward_hook(
        lambda _, inputs, __: seen.append((torch.is_grad_enabled(), inputs[0][..., : config.n_embd]))
    )
    truncated = gradients(model, model(tokens, num_steps=(3, 2), labels=tokens).loss)
    hook.remove()
    assert [on for on, _ in seen] == [False, False, False, True, True]

    state = seen[3][1].detach()  # what the three steps made of s_0, as a constant
    by_hand = gradients(model, model(tokens, num_steps=(0, 2), initial_state=state, labels=tokens).loss)
    full = gradients(model, model(tokens, num_steps=(0, 5), labels=tokens).loss)
    assert truncated.keys() == by_hand.keys() == dict(model.named_parameters()).keys()
    for name, gradient in truncated.items():
        assert torch.equal(gradient, by_hand[name]), name
    core = "transformer.core_block.0.attn.Wqkv.weight"
    assert (truncated[core] - full[core]).norm() > 1e-3 * full[core].norm()


def test_default_depth_is_the_mean_split_at_the_backpropagation_depth():
    model, tokens = perturbed(DENSE), batch(DENSE)
    assert torch.equal(model(tokens).logits, model(tokens, num_steps=(4, 2)).logits)
    shallow = MoEHuginnModel(replace(DENSE, mean_recurrence=1))
    assert torch.equal(shallow(tokens).logits, shallow(tokens, num_steps=(0, 1)).logits)


def test_no_recurrence_reads_the_initial_state():
    model, tokens = perturbed(CORE), batch(CORE)
    output = model(tokens, num_steps=(0, 0), labels=tokens)
    state = torch.from_numpy(initial_state(0, SEQUENCE, CORE.n_embd)).double()
    assert torch.allclose(output.latents[0], model.transformer["ln_f"](state), rtol=1e-12)
    assert output.recurrent_residual == 0
    assert output.moe.balance_loss == 0
    assert output.moe.counts_E.tolist() == [0] * 4


def test_residual_and_norm_describe_the_last_step():
    model, tokens = perturbed(DENSE), batch(DENSE)
    states = []
    model.transformer["adapter"].register_forward_hook(
        lambda _, inputs, __: states.append(inputs[0][..., : DENSE.n_embd])
    )
    three = model(tokens, num_steps=(1, 2))
    model(tokens, num_steps=(4, 0))
    s_2, s_3 = states[2], states[3 + 3]
    assert three.recurrent_residual.item() == pytest.approx((s_3 - s_2).norm(dim=-1).mean().item())
    assert three.state_norm.item() == pytest.approx(s_3.norm(dim=-1).mean().item())


@KINDS
def test_later_tokens_do_not_reach_earlier_logits(config):
    model, tokens = perturbed(config), batch(config, rows=1)
    changed = tokens.clone()
    changed[0, 40:] = (changed[0, 40:] + 1) % config.padded_vocab_size
    before, after = (model(x, num_steps=(2, 0)).logits[0] for x in (tokens, changed))
    assert torch.allclose(before[:40], after[:40], rtol=0, atol=1e-12)
    assert (before[40:] - after[40:]).abs().min(dim=1).values.max() > 1e-6


# ---- Loss -----------------------------------------------------------------------------------------------------------


def test_loss_is_the_mean_over_labels_that_count_plus_weighted_auxiliaries():
    model, tokens = perturbed(INJECTION), batch(INJECTION)
    labels = tokens.roll(-1, dims=1)
    labels[:, 50:] = -100
    output = model(tokens, num_steps=(1, 1), labels=labels)
    log_p = output.logits.log_softmax(-1)[:, :50].gather(2, labels[:, :50, None])
    assert output.log_ppl.item() == pytest.approx(-log_p.mean().item(), rel=1e-12)
    auxiliary = 0.01 * output.moe.balance_loss + 0.001 * output.moe.z_loss
    assert output.loss.item() == pytest.approx((output.log_ppl + auxiliary).item(), rel=1e-12)


def test_without_labels_there_is_no_loss():
    output = perturbed(DENSE)(batch(DENSE), num_steps=(1, 0))
    assert output.loss is None
    assert output.log_ppl is None
    assert output.moe is None
