"""A `.pth` file holds the model to the bit, in the public layout, and a bad file is refused in one line."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from torch_reference import CheckpointError, MoEHuginnConfig, MoEHuginnModel, load_checkpoint, save_checkpoint
from torch_reference.checkpoint import PREFIX

torch.set_num_threads(1)  # tensors this small lose tenfold to threads that wait for each other on a busy machine

DENSE = MoEHuginnConfig(
    n_embd=16,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=24,
    padded_vocab_size=40,
    block_size=32,
    n_layers_in_prelude=1,
    n_layers_in_recurrent_block=1,
    n_layers_in_coda=1,
    mean_recurrence=3,
    mean_backprop_depth=2,
)
INJECTION = replace(DENSE, num_experts=3, moe_k=2, moe_intermediate_size=8, balance_weight=0.02)
CORE = replace(INJECTION, moe_placement="core")
LN_F, ADAPTER = "transformer.ln_f.weight", "transformer.adapter.weight"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_checkpoint(MoEHuginnModel(INJECTION), tmp_path / "model.pth")
    return tmp_path / "model.pth"


def rewrite(path: Path, change) -> Path:
    """The file at `path` with `change` applied to its dict, beside it."""
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path.with_name("changed.pth"))
    return path.with_name("changed.pth")


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(path)
    message = str(error.value)
    assert "\n" not in message
    assert path.name in message
    return message


@pytest.mark.parametrize("config", [DENSE, INJECTION, CORE], ids=["dense", "injection", "core"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_comes_back_to_the_bit(tmp_path, config, dtype):
    model = MoEHuginnModel(config, seed=5).to(dtype)
    save_checkpoint(model, tmp_path / "model.pth")
    loaded = load_checkpoint(str(tmp_path / "model.pth"))
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert weight.dtype == theirs[name].dtype
        assert torch.equal(weight, theirs[name]), name
    tokens = torch.arange(20)[None]
    assert torch.equal(model(tokens).logits, loaded(tokens).logits)
    assert loaded.config.to_model_config() == config.to_model_config()
    assert all(weight.requires_grad for weight in loaded.parameters())
    assert not loaded.training
    assert os.listdir(tmp_path) == ["model.pth"]


def test_the_file_has_the_public_layout(saved):
    content = torch.load(saved, weights_only=True)
    assert set(content) == {"model", "model_config"}
    weights = content["model"]
    names = {*MoEHuginnModel(INJECTION).state_dict(), "lm_head.weight", "freqs_cis"}
    assert set(weights) == {"_orig_mod._original_module." + name for name in names}
    freqs_cis = weights[PREFIX + "freqs_cis"]
    assert freqs_cis.dtype == torch.float32
    assert freqs_cis.shape == (1, 32, 1, 4, 2)
    angle = torch.outer(torch.arange(32.0).double(), 50_000 ** (-torch.arange(4).double() / 4))
    assert torch.equal(freqs_cis[0, :, 0], torch.stack([angle.cos(), angle.sin()], -1).float())
    head, embedding = weights[PREFIX + "lm_head.weight"], weights[PREFIX + "transformer.wte.weight"]
    assert torch.equal(head, embedding)
    assert head.data_ptr() == embedding.data_ptr()  # written once


def test_names_without_prefix_and_without_the_repeated_tensors_load_too(saved):
    def strip(content):
        content["model"] = {
            name.removeprefix(PREFIX): weight
            for name, weight in content["model"].items()
            if not name.endswith(("lm_head.weight", "freqs_cis"))
        }

    loaded = load_checkpoint(rewrite(saved, strip))
    assert torch.equal(
        loaded.state_dict()["transformer.wte.weight"], MoEHuginnModel(INJECTION).state_dict()["transformer.wte.weight"]
    )


def test_angles_rounded_to_bfloat16_are_accepted(saved):
    def round_angles(content):
        content["model"][PREFIX + "freqs_cis"] = content["model"][PREFIX + "freqs_cis"].bfloat16()

    load_checkpoint(rewrite(saved, round_angles))


def set_weight(name, make):
    def change(content):
        content["model"][PREFIX + name] = make(content["model"].get(PREFIX + name))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_weight("lm_head.weight", lambda x: x + 1), "lm_head.weight differs from transformer.wte.weight"),
        (set_weight("freqs_cis", lambda x: x.roll(1, 1)), "freqs_cis is off by"),
        (set_weight("freqs_cis", lambda x: x * float("nan")), "freqs_cis is off by"),
        (set_weight("freqs_cis", lambda x: x[:, :8]), "freqs_cis has shape (1, 8, 1, 4, 2), not (1, 32, 1, 4, 2)"),
        (set_weight(LN_F, lambda x: x[:8]), "transformer.ln_f.weight has shape (8,), not (16,)"),
        (set_weight(LN_F, lambda _: "text"), "transformer.ln_f.weight is not a tensor"),
        (set_weight(LN_F, lambda x: x.int()), "ln_f.weight is not a tensor of floating"),
        (set_weight("transformer.ln_g.weight", lambda _: torch.ones(16)), "ln_g.weight is not a tensor of this"),
        (lambda content: content["model"].pop(PREFIX + ADAPTER), f"{ADAPTER} is missing"),
        (lambda content: content["model"].update({"transformer.ln_f.weight": torch.ones(16)}), "stands there twice"),
        (lambda content: content.pop("model_config"), "not a dict of 'model' and 'model_config'"),
        (lambda content: content.pop("model"), "not a dict of 'model' and 'model_config'"),
        (lambda content: content.update(model_config=None), "model_config=None must be a dict"),
        (lambda content: content["model_config"].update(qk_bias=False), "model_config.qk_bias=False"),
        (lambda content: content["model_config"].update(num_experts=2), "router.weight has shape (3, 16), not (2, 16)"),
        (lambda content: content["model_config"].update(moe_placement="core"), "transformer.core_block.0.moe"),
    ],
)  # fmt: skip
def test_a_file_of_another_model_is_refused_by_name(saved, change, message):
    assert message in refusal(rewrite(saved, change))


def test_missing_truncated_and_foreign_files_are_refused(saved, tmp_path):
    assert "no such file" in refusal(tmp_path / "absent.pth")
    assert "no such file" in refusal(tmp_path)  # a folder
    whole = saved.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 40):
        (tmp_path / "cut.pth").write_bytes(whole[:size])
        assert "cannot be loaded as a checkpoint" in refusal(tmp_path / "cut.pth")
    (tmp_path / "text.pth").write_text("not a checkpoint\n" * 50)
    assert "cannot be loaded as a checkpoint" in refusal(tmp_path / "text.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    assert "not a dict" in refusal(tmp_path / "list.pth")


def test_a_file_that_would_run_code_is_refused_and_runs_nothing(tmp_path):
    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "proof"),)

    torch.save({"model": Malicious(), "model_config": {}}, tmp_path / "evil.pth")
    assert "it holds more than tensors and plain values" in refusal(tmp_path / "evil.pth")
    assert not (tmp_path / "proof").exists()


def test_saving_never_overwrites_and_leaves_no_half_file(saved, tmp_path, monkeypatch):
    before = saved.read_bytes()
    with pytest.raises(CheckpointError, match="exists already"):
        save_checkpoint(MoEHuginnModel(DENSE), saved)
    assert saved.read_bytes() == before
    with pytest.raises(CheckpointError, match="there is no folder"):
        save_checkpoint(MoEHuginnModel(DENSE), tmp_path / "absent" / "model.pth")

    def fail(_, path):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(MoEHuginnModel(DENSE), tmp_path / "new.pth")
    assert os.listdir(tmp_path) == ["model.pth"]
