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
        (lambda content: content["model"].update({"transformer.ln_f.weight": torch.zeros(16)}), "is there twice"),
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
    assert "nor a Hugging Face folder" in refusal(tmp_path)
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
    assert "not a dict of 'model' and 'model_config'" in refusal(tmp_path / "evil.pth")
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


def test_a_bit_that_flipped_in_the_file_is_found(saved):
    whole = bytearray(saved.read_bytes())
    adapter = torch.load(saved, weights_only=True)["model"][PREFIX + ADAPTER]
    whole[whole.index(adapter.numpy().tobytes()) + 7] ^= 1
    saved.write_bytes(whole)
    assert "damaged: the checksum of" in refusal(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_weight(LN_F, lambda x: x * float("nan")), f"{LN_F} holds numbers that are not finite"),
        (set_weight(ADAPTER, lambda x: x.index_fill(0, torch.tensor(0), float("inf"))), "are not finite"),
        (set_weight(LN_F, lambda x: x.to(torch.float8_e4m3fn)), "cannot be loaded as a checkpoint"),
        (lambda content: content["model_config"].update(block_size=10**12), "block_size=1000000000000 is more"),
        (lambda content: content["model_config"].update(n_layers_in_prelude=10**9), "too few for a model of"),
        (lambda content: content["model_config"].update(state_init="zero"), "model_config.state_init='zero'"),
        (lambda content: content["model_config"].update(test_time_noise=0.1), "model_config.test_time_noise=0.1"),
        (lambda content: content["model_config"].update(use_abacus=True), "model_config.use_abacus=True"),
        (lambda content: content["model_config"].update(tie_word_embeddings=False), "tie_word_embeddings=False"),
    ],
)  # fmt: skip
def test_what_would_be_another_model_or_none_is_refused(saved, change, message):
    assert message in refusal(rewrite(saved, change))


class Stateful:
    """A stand-in for a tokenizer, loader or optimiser: an object with attributes, among them itself."""

    def __init__(self, **attributes):
        self.__dict__ |= attributes
        self.me = self


@pytest.mark.parametrize("inner", ["_forward_module.", "_forward_module.module."])
def test_a_checkpoint_of_the_public_training_code_is_read(saved, tmp_path, inner):
    """Every tensor twice, and objects around them."""
    content = torch.load(saved, weights_only=True)
    names = {name.removeprefix(PREFIX): weight for name, weight in content["model"].items()}
    content["model"] |= {f"_orig_mod.{inner}{name}": weight for name, weight in names.items()}
    besides = {
        "optimizer": {"state": {0: torch.zeros(3)}, "group": Stateful(lr=0.1)},
        "tokenizer": Stateful(path=tmp_path),
    }
    torch.save({**content, **besides}, tmp_path / "public.pth")
    loaded = load_checkpoint(tmp_path / "public.pth").state_dict()
    for name, weight in MoEHuginnModel(INJECTION).state_dict().items():
        assert torch.equal(loaded[name], weight), name


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model.", "_orig_mod._forward_module."])
def test_wrappers_of_names_are_taken_off_in_both_packages(saved, prefix):
    from jax_huginn.interop.errors import WeightsError
    from jax_huginn.interop.pth import read_pth

    def rename(content):
        content["model"] = {prefix + name.removeprefix(PREFIX): weight for name, weight in content["model"].items()}

    path = rewrite(saved, rename)
    theirs = read_pth(path).tensors
    for name, weight in load_checkpoint(path).state_dict().items():
        assert torch.equal(torch.from_numpy(theirs[name].read().copy()), weight), name

    def disagree(content):
        rename(content)
        content["model"]["_orig_mod.module." + LN_F] = content["model"][prefix + LN_F] + 1

    path = rewrite(saved, disagree)
    assert f"{LN_F} is there twice" in refusal(path)
    with pytest.raises(WeightsError, match=f"{LN_F} is there twice"):
        read_pth(path)


def test_of_two_tied_tensors_one_is_enough(saved):
    loaded = load_checkpoint(rewrite(saved, lambda content: content["model"].pop(PREFIX + "transformer.wte.weight")))
    assert torch.equal(
        loaded.state_dict()["transformer.wte.weight"], MoEHuginnModel(INJECTION).state_dict()["transformer.wte.weight"]
    )


def test_both_packages_hold_the_same_list_of_what_they_are():
    from jax_huginn.interop import model_config
    from torch_reference import config

    assert config._ONLY_READ == model_config._ONLY_READ
    assert config._FIXED == model_config._WRITTEN
    assert config._FIXED_ROPE == model_config._ROPE


def test_a_single_file_comes_before_an_old_index_in_both_packages(tmp_path):
    """Transformers' own rule."""
    import json

    from safetensors.torch import save_file

    from jax_huginn.interop.huggingface import read_huggingface

    model = MoEHuginnModel(DENSE, seed=1)
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
    old = {name: weight + 1 for name, weight in model.state_dict().items()}
    save_file(old, tmp_path / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(old, "model-00001-of-00001.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    described = {"model_type": "moe_huginn", **DENSE.to_model_config()}
    (tmp_path / "config.json").write_text(json.dumps(described))
    assert torch.equal(load_checkpoint(tmp_path).state_dict()[LN_F], model.state_dict()[LN_F])
    assert (read_huggingface(tmp_path).tensors[LN_F].read() == model.state_dict()[LN_F].numpy()).all()
    (tmp_path / "model.safetensors").unlink()
    assert torch.equal(load_checkpoint(tmp_path).state_dict()[LN_F], old[LN_F])
    (tmp_path / "config.json").write_text(json.dumps({**described, "model_type": "llama"}))
    assert "model_type='llama' is neither" in refusal(tmp_path)
