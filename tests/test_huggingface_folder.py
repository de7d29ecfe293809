"""An exported folder opens in Transformers where this project is not installed, and is the same model there."""

import json
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, StaticCache

import torch_reference
from eval_tasks.lm import HuginnLM
from jax_huginn.interop.huggingface import read_huggingface, write_huggingface
from jax_huginn.interop.names import params_of, to_torch
from jax_huginn.model import functional
from jax_huginn.model.huginn import MoEHuginnModel
from tests.evaluation_support import make_tokenizer
from tests.support import small_config
from torch_reference.evaluation import TorchLanguageModel

torch.set_num_threads(1)
MODEL = {"vocab_size": 264, "param_dtype": "float64", "dtype": "float64"}
KINDS = {
    "dense": {"moe": {"experts": 0}, "model": MODEL},
    "grouped heads": {"moe": {"experts": 0}, "model": {**MODEL, "kv_heads": 2}},
    "injection": {"moe": {"residual": True}, "model": MODEL},
    "core": {"moe": {"placement": "core"}, "model": MODEL},
}


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """kind -> the folder, the twin and what Transformers makes of the folder, all in float64."""
    home = tmp_path_factory.mktemp("folders")
    make_tokenizer().save_pretrained(home / "tokenizer")
    models = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(home / "modules"))
        patch.syspath_prepend(home / "modules")
        for kind, sections in KINDS.items():
            folder = home / kind.replace(" ", "_")
            write_huggingface(lively(small_config(**sections)), folder, home / "tokenizer")
            models[kind] = SimpleNamespace(
                folder=folder, twin=torch_reference.load_checkpoint(folder),
                model=AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto").eval(),
            )  # fmt: skip
        yield models


def lively(config) -> MoEHuginnModel:
    """Initial weights with noise, so that no norm and no bias is neutral."""
    graphdef, params = functional.split(MoEHuginnModel(config, seed=1))
    random = np.random.default_rng(0)
    noisy = jax.tree.map(lambda leaf: leaf + 0.1 * random.standard_normal(leaf.shape), params)
    return nnx.merge(graphdef, noisy)


def tokens(rows: int, length: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(length).integers(3, 264, (rows, length)))


every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
def test_transformers_opens_it_as_the_same_model(opened, kind):
    folder, twin, model = vars(opened[kind]).values()
    assert type(model).__module__.startswith("transformers_modules.")
    assert model.dtype == torch.float64
    for name, weight in twin.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    assert model.lm_head.weight is model.transformer["wte"].weight
    x = tokens(2, 70)
    for steps in (1, 4, (2, 1)):
        expected = twin(x, num_steps=steps if isinstance(steps, tuple) else (steps, 0)).logits
        assert torch.allclose(model(x, num_steps=steps).logits, expected, rtol=0, atol=1e-10)
    assert torch.allclose(model(x).logits, twin(x).logits, rtol=0, atol=1e-10)
    assert torch.allclose(model(x, logits_to_keep=3).logits, model(x).logits[:, -3:], rtol=0, atol=1e-12)
    assert AutoTokenizer.from_pretrained(folder).eos_token_id == model.config.eos_token_id


@every_kind
def test_generation_is_the_same_with_a_cache_without_and_in_the_twin(opened, kind):
    _, twin, model = vars(opened[kind]).values()
    x = tokens(1, 66)
    expected = torch_reference.generate.greedy(twin, x.tolist(), (3, 0), 9)[0]
    for use_cache in (True, False):
        out = model.generate(
            x, num_steps=3, max_new_tokens=9, do_sample=False, use_cache=use_cache, eos_token_id=None, pad_token_id=2
        )
        assert out[0, 66:].tolist() == expected
    assert model.generate(x, num_steps=2, max_new_tokens=4, num_beams=3, do_sample=False).shape[0] == 1


@every_kind
def test_a_ragged_batch_is_its_rows(opened, kind):
    model = opened[kind].model
    rows = [tokens(1, length)[0] for length in (65, 40, 3)]
    batch = torch.full((3, 65), 2)
    mask = torch.zeros(3, 65, dtype=torch.long)
    for i, row in enumerate(rows):
        batch[i, -len(row) :], mask[i, -len(row) :] = row, 1
    logits = model(batch, attention_mask=mask, num_steps=3).logits
    for i, row in enumerate(rows):
        alone = model(row[None], num_steps=3).logits[0]
        assert torch.allclose(logits[i, -len(row) :], alone, rtol=0, atol=1e-10)
    settings = {"num_steps": 3, "max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    together = model.generate(batch, attention_mask=mask, **settings)[:, 65:]
    for i, row in enumerate(rows):
        assert torch.equal(together[i], model.generate(row[None], **settings)[0, len(row) :])


@every_kind
def test_what_transformers_saves_opens_again_everywhere(opened, kind, tmp_path):
    _, twin, model = vars(opened[kind]).values()
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=True, dtype="auto").eval()
    x = tokens(1, 64)
    assert torch.allclose(again(x, num_steps=2).logits, model(x, num_steps=2).logits, rtol=0, atol=1e-12)
    ours = read_huggingface(tmp_path / "saved").tensors
    theirs = torch_reference.load_checkpoint(tmp_path / "saved").state_dict()
    for name, weight in twin.state_dict().items():
        np.testing.assert_array_equal(ours[name].read(), weight.numpy())
        assert torch.equal(theirs[name], weight)


def test_labels_are_shifted_and_weigh_the_balance(opened):
    for kind in ("dense", "injection"):
        _, twin, model = vars(opened[kind]).values()
        x = tokens(2, 64)
        labels = torch.cat([x[:, 1:], torch.full((2, 1), -100)], dim=1)
        expected = twin(x, labels=labels).loss
        assert torch.allclose(model(x, labels=x).loss, expected, rtol=1e-12)


def test_a_few_steps_of_training_change_all_weights(opened):
    folder = opened["injection"].folder
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto").train()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        loss = model(tokens(2, 64), labels=tokens(2, 64)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(not torch.equal(weight, before[name]) for name, weight in model.named_parameters())


def test_transformers_own_trainer_and_pipeline_take_it(opened, tmp_path):
    from transformers import Trainer, TrainingArguments, pipeline

    folder = opened["injection"].folder
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto")
    writer = pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(folder))
    written = writer("a recurrent", max_new_tokens=3, do_sample=False, num_steps=2)[0]["generated_text"]
    assert written.startswith("a recurrent")
    pytest.importorskip("accelerate", reason="Transformers' Trainer needs it")
    rows = [{"input_ids": row, "labels": row} for row in tokens(4, 32)]
    settings = TrainingArguments(
        str(tmp_path / "trained"), max_steps=3, per_device_train_batch_size=2, report_to=[], use_cpu=True
    )
    assert Trainer(model, settings, train_dataset=rows).train().training_loss > 0
    model.save_pretrained(tmp_path / "saved")
    read_huggingface(tmp_path / "saved")


def test_a_config_alone_makes_a_fresh_model(opened):
    config = AutoConfig.from_pretrained(opened["dense"].folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    std = model.transformer["wte"].weight.std().item()
    assert std == pytest.approx(0.987 * (2 / (5 * 32)) ** 0.5, rel=0.05)


def test_what_cannot_be_is_said(opened):
    model = opened["dense"].model
    x = tokens(1, 8)
    kept = model(x, num_steps=2).past_key_values
    for message, call in {
        "num_steps=3 needs a cache of 8 layers, not 6": lambda: model(x, num_steps=3, past_key_values=kept),
        "a StaticCache cannot hold every recurrence": lambda: model(
            x, past_key_values=StaticCache(config=model.config, max_cache_len=16)
        ),
        r"attention_mask has shape \(1, 4\), not \(1, 8\)": lambda: model(x, attention_mask=torch.ones(1, 4)),
        "129 tokens is longer than": lambda: model(tokens(1, 129)),
        "inputs_embeds cannot be given": lambda: model(x, inputs_embeds=torch.zeros(1, 8, 32)),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match="num_stepps"):
        model.generate(x, num_stepps=3, max_new_tokens=2)


def test_lm_evals_own_adapter_gives_our_scores(opened):
    pytest.importorskip("accelerate", reason="lm-eval's adapter of Transformers needs it")
    from lm_eval.models.huggingface import HFLM

    pairs = [("def f(x):\n    ", "return x"), ("a", "b"), ("a longer context", " and its end")]
    asked = [SimpleNamespace(args=pair) for pair in pairs]
    for kind in ("dense", "core"):
        folder, twin, _ = vars(opened[kind]).values()
        theirs = HFLM(pretrained=str(folder), trust_remote_code=True, mean_recurrence=4, device="cpu")
        ours = HuginnLM(TorchLanguageModel(twin), make_tokenizer(), 4, 2)
        assert theirs.max_length == ours.model.max_length
        for one, other in zip(ours.loglikelihood(asked), theirs.loglikelihood(asked), strict=True):
            assert one[0] == pytest.approx(other[0], abs=1e-4)
            assert one[1] == other[1]


@pytest.mark.parametrize("kind", ["dense", "core"])
def test_token_ids_agree_in_all_files(opened, kind):
    folder = opened[kind].folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config, generation = (json.loads((folder / f"{name}.json").read_text()) for name in ("config", "generation_config"))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert config[name] == generation[name] == getattr(tokenizer, name)
    assert tokenizer("ab")["input_ids"] == [config["bos_token_id"], *tokenizer.encode("ab", add_special_tokens=False)]


def test_the_folder_needs_nothing_of_the_project(opened, tmp_path):
    """In a process in which neither package can be imported."""
    import subprocess
    import sys

    folder = shutil.copytree(opened["core"].folder, tmp_path / "folder")
    program = (
        "import sys\n"
        "for name in ('torch_reference', 'jax_huginn', 'jax', 'eval_tasks'): sys.modules[name] = None\n"
        "import torch; from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype='auto')\n"
        "print(model(torch.arange(3, 73)[None], num_steps=2).logits.double().abs().sum().item())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)], cwd=tmp_path, capture_output=True, text=True, check=True,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    expected = opened["core"].twin(torch.arange(3, 73)[None], num_steps=(2, 0)).logits.abs().sum().item()
    assert float(done.stdout) == pytest.approx(expected, rel=1e-9)


def test_the_tensors_are_those_of_the_jax_model(opened):
    weights = opened["core"].model.state_dict()
    for name, tensor in to_torch(params_of(lively(small_config(**KINDS["core"])))):
        np.testing.assert_array_equal(weights[name].numpy(), tensor)
