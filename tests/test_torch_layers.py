"""The layers of the PyTorch twin: Mixture of Experts, number types, RoPE and norm."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.torch_support import CORE, INJECTION, KINDS, batch, gradients, perturbed
from torch_reference.layers import RMSNorm, apply_rope
from torch_reference.moe import MoE

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


def test_core_placement_pools_gradient_iterations_and_averages_blocks():
    model, tokens = perturbed(CORE), batch(CORE)
    calls = []
    for block in model.transformer["core_block"]:
        block.moe.register_forward_hook(lambda _, __, output: calls.append(output[1]))
    found = model(tokens, num_steps=(2, 3)).moe
    assert len(calls) == (2 + 3) * 2
    counted = calls[4:]
    for layer in range(2):
        own = counted[layer::2]
        assert torch.equal(found.counts_QE[layer], sum(call.counts_E for call in own))
        assert torch.allclose(found.probability_QE[layer], sum(call.probability_E for call in own) / 3, rtol=1e-12)
    share_QE = found.counts_QE / found.counts_QE.sum(1, keepdim=True)
    assert found.balance_loss.item() == pytest.approx(4 * (share_QE * found.probability_QE).sum(1).mean().item())
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
