"""The PyTorch reference is the model of the paper and of its own description, term by term."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from torch_reference import MoEHuginnConfig, MoEHuginnConfig700M, MoEHuginnModel
from torch_reference.initial_state import initial_state
from torch_reference.model import MoE, RMSNorm, apply_rope

torch.set_num_threads(1)  # tensors this small lose tenfold to threads that wait for each other on a busy machine

ROOT = Path(__file__).resolve().parents[1]
SEQUENCE = 64  # a short prompt hides RoPE mistakes

DENSE = MoEHuginnConfig(
    n_embd=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=24,
    padded_vocab_size=48,
    block_size=96,
    n_layers_in_prelude=1,
    n_layers_in_recurrent_block=2,
    n_layers_in_coda=1,
    mean_recurrence=6,
    mean_backprop_depth=2,
)
INJECTION = replace(DENSE, num_experts=4, moe_k=2, moe_intermediate_size=12, z_weight=0.001)
RESIDUAL = replace(INJECTION, moe_residual=True)
CORE = replace(INJECTION, moe_placement="core")
KINDS = pytest.mark.parametrize(
    "config", [DENSE, INJECTION, RESIDUAL, CORE], ids=["dense", "injection", "residual", "core"]
)


def perturbed(config: MoEHuginnConfig, dtype: torch.dtype = torch.float64) -> MoEHuginnModel:
    """Weights at which nothing is neutral: at the init, swapped norms or a missing bias would change nothing."""
    model = MoEHuginnModel(config).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(dtype)
            if weight.ndim == 1:
                weight.copy_(1 + 0.3 * noise)
            elif "qk_bias" in name:
                weight.copy_(0.5 * noise)
            elif name.endswith((".proj.weight", ".w_down.weight")):
                weight.mul_(5)
            elif "router" in name:
                weight.mul_(10)
    return model


def batch(config: MoEHuginnConfig, rows: int = 2) -> torch.Tensor:
    return torch.randint(0, config.padded_vocab_size, (rows, SEQUENCE), generator=torch.Generator().manual_seed(2))


def gradients(model: MoEHuginnModel, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


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


# ---- Mixture of Experts ---------------------------------------------------------------------------------------------


def test_moe_equals_every_expert_on_every_token_in_values_and_gradients():
    moe = perturbed(INJECTION).transformer["moe"]
    x_BSD = torch.randn(2, 9, 32, dtype=torch.float64, requires_grad=True)
    y_BSD, _ = moe(x_BSD)

    logits = x_BSD @ moe.router.weight.T
    chosen = logits.topk(2).indices
    weight = torch.zeros_like(logits).scatter(2, chosen, logits.gather(2, chosen).softmax(-1))
    oracle = moe.shared_expert(x_BSD)
    for i, expert in enumerate(moe.specialized_experts):
        oracle = oracle + weight[..., [i]] * expert(x_BSD)
    assert torch.allclose(y_BSD, oracle, rtol=1e-12, atol=1e-14)
    inputs = [x_BSD, *moe.parameters()]
    for ours, theirs in zip(*(torch.autograd.grad(z.sin().sum(), inputs) for z in (y_BSD, oracle)), strict=True):
        assert (ours - theirs).norm() <= 1e-12 * theirs.norm()


def test_an_expert_without_tokens_gets_a_gradient_of_zero():
    model = perturbed(replace(INJECTION, num_experts=32))  # more experts than two tokens can visit
    found = gradients(model, model(batch(INJECTION)[:1, :2], num_steps=(0, 1), labels=batch(INJECTION)[:1, :2]).loss)
    idle = [name for name, gradient in found.items() if "specialized" in name and not gradient.any()]
    assert found.keys() == dict(model.named_parameters()).keys()
    assert len(idle) >= 28 * 3


def test_routing_statistics_count_by_hand():
    model, tokens = perturbed(INJECTION), batch(INJECTION)[:, :63]  # shares that no float32 holds exactly
    inputs = []
    model.transformer["moe"].register_forward_hook(lambda _, x, __: inputs.append(x[0].flatten(0, 1)))
    statistics = model(tokens, num_steps=(1, 0)).moe
    logits = inputs[0] @ model.transformer["moe"].router.weight.T
    p = logits.softmax(-1)
    order = logits.argsort(-1, descending=True)
    counts = [(order[:, :2] == i).sum().item() for i in range(4)]
    assert statistics.counts_E.tolist() == counts
    assert statistics.first_choice_E.tolist() == [(order[:, 0] == i).sum().item() for i in range(4)]
    assert torch.allclose(statistics.probability_E, p.mean(0), rtol=1e-12)
    assert statistics.entropy.item() == pytest.approx(torch.distributions.Categorical(p).entropy().mean().item())
    assert statistics.z_loss.item() == pytest.approx(logits.exp().sum(-1).log().square().mean().item())
    share = np.array(counts) / sum(counts)
    assert statistics.balance_loss.item() == pytest.approx(4 * (share * p.mean(0).detach().numpy()).sum(), rel=1e-12)


def test_core_placement_averages_over_gradient_iterations_and_blocks():
    model, tokens = perturbed(CORE), batch(CORE)
    calls = []
    for block in model.transformer["core_block"]:
        block.moe.register_forward_hook(lambda _, __, output: calls.append(output[1]))
    found = model(tokens, num_steps=(2, 3)).moe
    assert len(calls) == (2 + 3) * 2
    counted = calls[4:]
    assert found.balance_loss.item() == pytest.approx(np.mean([call.balance_loss.item() for call in counted]))
    assert found.z_loss.item() == pytest.approx(np.mean([call.z_loss.item() for call in counted]))
    assert torch.equal(found.counts_E, sum(call.counts_E for call in counted))
    assert found.counts_E.sum() == 3 * 2 * tokens.numel() * 2
    assert not torch.equal(calls[4].counts_E, calls[8].counts_E)  # routed anew


def test_balance_is_one_when_balanced_and_e_when_collapsed():
    x_BSD = torch.eye(4, dtype=torch.float64)[None]
    moe = MoE(replace(INJECTION, n_embd=4, num_attention_heads=2, moe_k=1)).double()
    for router, balance in ((torch.eye(4), 1.0), (torch.tensor([[1.0], [0], [0], [0]]).expand(4, 4), 4.0)):
        moe.router.weight.data = 50 * router.double()
        assert moe(x_BSD)[1].balance_loss.item() == pytest.approx(balance)


def test_ties_go_to_the_experts_of_lowest_index():
    moe = MoE(replace(INJECTION, num_experts=64))
    moe.router.weight.data.zero_()
    counts = moe(torch.randn(1, 30, 32))[1].counts_E.tolist()
    assert counts == [30, 30] + [0] * 62


# ---- Types ----------------------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_runs_in_every_type_near_the_float64_result(config, dtype):
    exact = perturbed(config)
    model, tokens = perturbed(config).to(dtype), batch(config)
    output = model(tokens, num_steps=(1, 1), labels=tokens)
    wide = torch.promote_types(dtype, torch.float32)
    assert output.logits.dtype == output.loss.dtype == output.recurrent_residual.dtype == wide
    assert output.latents.dtype == dtype
    tolerance = {torch.bfloat16: 0.05, torch.float32: 1e-5, torch.float64: 1e-13}[dtype]
    loss = exact(tokens, num_steps=(1, 1), labels=tokens).loss
    assert output.loss.item() == pytest.approx(loss.item(), rel=tolerance)


def test_router_and_norm_compute_in_float32_for_bfloat16():
    x = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(4)).bfloat16()
    moe = perturbed(INJECTION).transformer["moe"].bfloat16()
    logits = x[0].double() @ moe.router.weight.double().T
    expected = logits.logsumexp(-1).square().mean().item()
    assert moe(x)[1].z_loss.item() == pytest.approx(expected, rel=1e-5)

    norm = RMSNorm(32, 1e-6).bfloat16()
    norm.weight.data = (1 + torch.randn(32) / 3).bfloat16()
    x64 = x.double()
    normal = (x64 / (x64.square().mean(-1, keepdim=True) + 1e-6).sqrt()).bfloat16()
    assert torch.equal(norm(x), normal * norm.weight)  # cast back, then scaled


def test_rope_turns_interleaved_pairs_and_sees_only_distances():
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    turned_q, turned_k = (apply_rope(x.expand(1, 90, 1, 8), 50_000.0)[0, :, 0] for x in (q, k))
    assert turned_q[30] @ turned_k[10] == pytest.approx((turned_q[85] @ turned_k[65]).item(), rel=1e-12)
    assert torch.allclose(turned_q.view(90, 4, 2).norm(dim=-1), q.view(4, 2).norm(dim=-1).expand(90, 4))


# ---- Initial state and weights --------------------------------------------------------------------------------------


def test_initial_state_depends_on_seed_and_position_alone():
    whole = initial_state(0, 300, 16)
    assert np.array_equal(initial_state(0, 150, 16, start=120), whole[120:270])
    assert np.array_equal(initial_state(0, 5, 16), whole[:5])
    assert initial_state(0, 0, 16).shape == (0, 16)
    assert not np.array_equal(initial_state(1, 300, 16), whole)
    assert whole.dtype == np.float32


def test_initial_state_is_the_recipe_both_packages_hold():
    for position in (0, 131):
        generator = np.random.Generator(np.random.Philox(key=7, counter=[0, 0, 0, position]))
        x = generator.standard_normal(2000)  # wide enough that some lie beyond three
        assert (np.abs(x) > 3).any()
        while (np.abs(x) > 3).any():
            bad = np.abs(x) > 3
            x[bad] = generator.standard_normal(bad.sum())
        expected = (x * np.sqrt(2 / 5)).astype(np.float32)
        assert np.array_equal(initial_state(7, 1, 2000, start=position)[0], expected)
    state = initial_state(0, 200, 1000)
    assert state.var() == pytest.approx(0.389, abs=0.003)
    assert np.abs(state).max() <= 3 * np.sqrt(0.4) + 1e-6


def test_rows_share_the_initial_state_so_that_batches_do_not_matter():
    model, tokens = perturbed(INJECTION), batch(INJECTION, rows=3)
    together = model(tokens, num_steps=(3, 0)).logits
    alone = torch.cat([model(row[None], num_steps=(3, 0)).logits for row in tokens])
    assert torch.allclose(together, alone, rtol=0, atol=1e-11)


@pytest.mark.parametrize("moe", [{}, {"moe_residual": True}, {"moe_placement": "core"}])
def test_initial_weights_follow_takase(moe):
    """The experts' w_down is an output projection where the MoE is a residual branch, else a plain matrix."""
    config = replace(INJECTION, n_embd=64, intermediate_size=96, moe_intermediate_size=96, **moe)
    weights = MoEHuginnModel(config, seed=3).state_dict()
    std, depth = (2 / (5 * 64)) ** 0.5, 1 + 2 * 6 + 1
    for name, weight in weights.items():
        if weight.ndim == 1:
            assert (weight == 1).all(), name
        elif "qk_bias" in name:
            assert (weight == 0).all(), name
        else:
            is_output = name.endswith(".proj.weight") or (name.endswith("w_down.weight") and bool(moe))
            expected = 0.02 if "router" in name else 0.987 * std / ((2 * depth) ** 0.5 if is_output else 1)
            assert weight.std().item() == pytest.approx(expected, rel=0.1), name
            if "router" not in name:
                assert weight.abs().max() <= 3.001 * expected / 0.987, name
    again, other = (MoEHuginnModel(config, seed=seed).state_dict() for seed in (3, 4))
    assert all(torch.equal(weight, again[name]) for name, weight in weights.items())
    assert not torch.equal(weights["transformer.wte.weight"], other["transformer.wte.weight"])


# ---- Mistakes are named ---------------------------------------------------------------------------------------------


def test_calls_that_cannot_work_name_the_value():
    model, tokens = MoEHuginnModel(DENSE), batch(DENSE)
    with pytest.raises(ValueError, match=r"128 tokens is longer than .*block_size=96"):
        model(tokens.repeat(1, 2))
    with pytest.raises(ValueError, match=r"num_steps=\(-1, 2\)"):
        model(tokens, num_steps=(-1, 2))
    with pytest.raises(ValueError, match=r"initial_state has shape \(1, 64, 32\), not \(2, 64, 32\)"):
        model(tokens, initial_state=torch.zeros(1, 64, 32))


@KINDS
def test_config_survives_the_file_layout(config):
    config = replace(config, rope_base=10_000.0, norm_eps=1e-5, name="x", balance_weight=0.02)
    values = config.to_model_config()
    same = config if config.num_experts else replace(config, moe_k=2, moe_intermediate_size=0)
    restored = MoEHuginnConfig.from_model_config(values)
    assert restored == same if config.num_experts else restored.to_model_config() == values
    assert values["rope_settings"] == {"use_rope": True, "rope_condense_ratio": 1, "rope_base": 10_000.0}
    assert ("num_experts" in values) == (config.num_experts > 0)
    layout = {
        "name", "architecture_class_name", "n_embd", "num_attention_heads", "num_key_value_heads",
        "intermediate_size", "padded_vocab_size", "vocab_size", "block_size", "norm_eps", "n_layers_in_prelude",
        "n_layers_in_recurrent_block", "n_layers_in_coda", "mean_recurrence", "mean_backprop_depth",
        "injection_type", "tie_embeddings", "qk_bias", "bias", "rope_settings", "block_class_name",
        "norm_class_name", "mlp_class_name", "nonlin_name", "init_strategy", "sampling_scheme",
    }  # fmt: skip
    moe = {
        "num_experts", "moe_k", "moe_intermediate_size", "moe_placement", "moe_residual", "balance_weight", "z_weight",
    }  # fmt: skip
    assert set(values) == layout | (moe if config.num_experts else set())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_class_name": "TransformerPreNormBlock"}, "block_class_name='TransformerPreNormBlock'"),
        ({"norm_class_name": "LayerNorm"}, "norm_class_name='LayerNorm'"),
        ({"mlp_class_name": "BaseMLP"}, "mlp_class_name='BaseMLP'"),
        ({"nonlin_name": "ReLU"}, "nonlin_name='ReLU'"),
        ({"injection_type": "add"}, "injection_type='add'"),
        ({"tie_embeddings": False}, "tie_embeddings=False"),
        ({"qk_bias": False}, "qk_bias=False"),
        ({"bias": True}, "bias=True"),
        ({"rope_settings": {"use_rope": False}}, "rope_settings.use_rope=False"),
        ({"rope_settings": {"rope_condense_ratio": 2}}, "rope_settings.rope_condense_ratio=2"),
        ({"rope_settings": 3}, "rope_settings=3"),
        ({"n_embd": None}, "n_embd is missing"),
        ({"n_embd": "32"}, "n_embd='32' must be of type int"),
        ({"n_embd": 30}, "n_embd=30 must be divisible by num_attention_heads=4"),
        ({"n_embd": 36}, "n_embd=36 over num_attention_heads=4"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 must divide"),
        ({"moe_k": 5}, "moe_k=5 is more than num_experts=4"),
        ({"moe_placement": "coda"}, "moe_placement='coda'"),
        ({"moe_placement": "core", "moe_residual": True}, "moe_residual=True"),
        ({"mean_recurrence": 0}, "mean_recurrence=0 must be positive"),
    ],
)
def test_config_refuses_what_it_cannot_represent(change, message):
    with pytest.raises(ValueError, match=r"^model_config\.") as error:
        MoEHuginnConfig.from_model_config({**INJECTION.to_model_config(), **change})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_public_config_without_key_heads_is_read():
    values = DENSE.to_model_config()
    del values["num_key_value_heads"]
    assert MoEHuginnConfig.from_model_config(values).num_key_value_heads == 4


def test_imports_no_jax():
    code = "import sys, torch_reference; sys.exit(any(name in sys.modules for name in ('jax', 'jax_huginn')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
