"""`python -m jax_huginn.export` and `import_checkpoint`: every bit arrives, in Torch, in the layouts others read."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.torch import load_file

import torch_reference
from jax_huginn import import_checkpoint
from jax_huginn.checkpoints.import_run import import_weights
from jax_huginn.checkpoints.load import find_step
from jax_huginn.checkpoints.sources import load_checkpoint, open_source
from jax_huginn.data.tokenizer import save_tokenizer, train_tokenizer
from jax_huginn.export import main as export_main
from jax_huginn.interop.errors import ExportError, WeightsError
from jax_huginn.interop.huggingface import read_huggingface, write_huggingface
from jax_huginn.interop.names import params_of, to_torch
from jax_huginn.interop.pth import PREFIX, read_pth, write_pth
from jax_huginn.model.huginn import MoEHuginnModel, abstract_model
from tests.support import random_model

torch.set_num_threads(1)

KINDS = {
    "dense": {"moe": {"experts": 0}},
    "grouped heads": {"moe": {"experts": 0}, "model": {"kv_heads": 2}},
    "moe injection": {"moe": {"residual": True}},
    "moe core": {"moe": {"placement": "core"}},
    "float64": {"model": {"dtype": "float64", "param_dtype": "float64"}},
}
# A dense model's config.json holds these and model_type, no more.
PUBLIC_ARGUMENTS = [
    "n_embd", "n_heads", "n_layers", "block_size", "vocab_size", "padding_multiple", "tie_embeddings",
    "intermediate_size", "bias", "architecture_class_name", "block_class_name", "norm_class_name", "norm_eps",
    "mlp_class_name", "nonlin_name", "init_strategy", "init_orthogonal", "state_init", "injection_type",
    "n_layers_in_recurrent_block", "mean_recurrence", "sampling_scheme", "mean_backprop_depth", "n_layers_in_prelude",
    "n_layers_in_coda", "qk_bias", "activation_checkpoint_impl", "rope_base", "torch_dtype", "dtype", "architectures",
    "auto_map",
]  # fmt: skip


def assert_same(ours: MoEHuginnModel, theirs: MoEHuginnModel) -> None:
    """Every weight to the bit, and all that shapes the model."""
    jax.tree.map(np.testing.assert_array_equal, params_of(ours), params_of(theirs))
    assert ours.config.model == theirs.config.model
    assert ours.config.recurrence == theirs.config.recurrence
    assert ours.config.moe.experts == 0 == theirs.config.moe.experts or ours.config.moe == theirs.config.moe


def run_main(main, monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["verb", *map(str, arguments)])
    main()


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    save_tokenizer(train_tokenizer(["a tale told by a recurrent idiot"], 259), folder)
    return folder


@pytest.fixture
def imported(make_config, tmp_path, tokenizer) -> Path:
    """A run folder that an import made, with a tokenizer."""
    write_huggingface(random_model(make_config()), tmp_path / "folder", tokenizer)
    import_weights(read_huggingface(tmp_path / "folder"), tmp_path / "run")
    return tmp_path / "run"


# ---- Round trips ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_pth_comes_back_to_the_bit(make_config, tmp_path, kind):
    model = random_model(make_config(**KINDS[kind]))
    write_pth(model, tmp_path / "model.pth")
    import_weights(read_pth(tmp_path / "model.pth"), tmp_path / "run")
    loaded = load_checkpoint(tmp_path / "run")
    assert_same(model, loaded)
    assert find_step(tmp_path / "run") == tmp_path / "run/checkpoints/0"
    assert open_source(tmp_path / "run").config.run_dir == str(tmp_path / "run")
    assert json.loads((tmp_path / "run/config.json").read_text())["run_dir"] == str(tmp_path / "run")
    # and the other way round: the import's export is the file that it came from
    write_pth(loaded, tmp_path / "again.pth")
    first, again = (torch.load(tmp_path / name, weights_only=True)["model"] for name in ("model.pth", "again.pth"))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("kind", KINDS)
def test_a_hugging_face_folder_comes_back_to_the_bit(make_config, tmp_path, tokenizer, kind):
    model = random_model(make_config(**KINDS[kind]))
    write_huggingface(model, tmp_path / "folder", tokenizer)
    weights = read_huggingface(tmp_path / "folder")
    assert weights.tokenizer == tmp_path / "folder"
    params = jax.tree.map(lambda lazy: jax.numpy.asarray(lazy.read()), weights.params())
    assert_same(model, nnx.merge(abstract_model(weights.config)[0], params))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["model.pth", "folder"])
def test_the_twin_loads_our_export(make_config, tmp_path, kind, form):
    model = random_model(make_config(**KINDS[kind]))
    (write_pth if form == "model.pth" else write_huggingface)(model, tmp_path / form)
    twin = torch_reference.load_checkpoint(tmp_path / form)
    weights = twin.state_dict()
    for name, tensor in to_torch(params_of(model)):
        np.testing.assert_array_equal(weights.pop(name).numpy(), tensor, err_msg=name)
    assert not weights


def test_bfloat16_shards_come_back_to_the_bit(make_config, tmp_path):
    model = random_model(make_config(**KINDS["dense"]))
    write_huggingface(model, tmp_path / "folder", dtype="bfloat16", shard_bytes=10_000)
    index = json.loads((tmp_path / "folder/model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{n + 1:05}-of-{len(files):05}.safetensors" for n in range(len(files))]
    assert len(files) > 2
    shards = {file: load_file(tmp_path / "folder" / file) for file in files}  # the library reads what we wrote
    tensors = {name: tensor for shard in shards.values() for name, tensor in shard.items()}
    assert index["weight_map"] == {name: file for file, shard in shards.items() for name in shard}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert json.loads((tmp_path / "folder/config.json").read_text())["torch_dtype"] == "bfloat16"
    assert tensors.pop("freqs_cis").dtype == torch.float32

    weights = read_huggingface(tmp_path / "folder")
    assert (weights.config.model.dtype, weights.config.model.param_dtype) == ("bfloat16", "float32")
    import_weights(weights, tmp_path / "run")
    for name, tensor in to_torch(params_of(load_checkpoint(tmp_path / "run"))):
        assert tensors[name].dtype == torch.bfloat16
        np.testing.assert_array_equal(tensors[name].float().numpy(), tensor, err_msg=name)
    twin = torch_reference.load_checkpoint(tmp_path / "folder")
    assert torch.equal(twin.state_dict()["transformer.ln_f.weight"], tensors["transformer.ln_f.weight"])


# ---- The layouts ------------------------------------------------------------------------------------------------


def test_a_dense_folder_has_the_public_names_and_arguments_and_no_others(make_config, tmp_path):
    config = make_config(**KINDS["dense"])
    write_huggingface(random_model(config), tmp_path / "folder")
    described = json.loads((tmp_path / "folder/config.json").read_text())
    assert described.pop("model_type") == "huginn_raven"
    assert set(described) == set(PUBLIC_ARGUMENTS)
    expected = {"n_embd": 32, "n_heads": 4, "n_layers": 4, "block_size": 128, "vocab_size": 96, "padding_multiple": 32}
    assert expected.items() <= described.items()
    assert described["tie_embeddings"] is described["qk_bias"] is True
    assert described["bias"] is described["init_orthogonal"] is False

    write_pth(random_model(config), tmp_path / "model.pth")
    in_file = torch.load(tmp_path / "model.pth", weights_only=True)["model"]
    in_folder = load_file(tmp_path / "folder/model.safetensors")
    assert in_folder.keys() == {name.removeprefix(PREFIX) for name in in_file}
    assert all(torch.equal(tensor, in_file[PREFIX + name]) for name, tensor in in_folder.items())


@pytest.mark.parametrize("kind", ["grouped heads", "moe injection", "moe core"])
def test_what_the_public_type_cannot_say_gets_our_own(make_config, tmp_path, kind):
    config = make_config(**KINDS[kind])
    write_huggingface(random_model(config), tmp_path / "folder")
    described = json.loads((tmp_path / "folder/config.json").read_text())
    assert described["model_type"] == "moe_huginn"
    assert described["num_key_value_heads"] == config.model.kv_heads
    assert described.get("moe_placement") == (config.moe.placement if config.moe.experts else None)


# ---- The commands -----------------------------------------------------------------------------------------------


def test_the_commands_convert_a_run_to_both_forms_and_back(imported, tmp_path, monkeypatch, tokenizer, capsys):
    model = load_checkpoint(imported)
    run_main(export_main, monkeypatch, imported, "--out", tmp_path / "model.pth", "--compare", "0")
    assert capsys.readouterr().out.count("\n") == 1
    reports = []
    for out, source, dtype in (("bfloat16", imported, "bfloat16"), ("float32", imported / "checkpoints/0", "float32")):
        run_main(export_main, monkeypatch, source, "--out", tmp_path / out, "--dtype", dtype, "--compare", "1,6")
        found = re.findall(r"recurrence +(\d+)  logits (\S+)  KL (\S+) nats", capsys.readouterr().out)
        reports.append([tuple(map(float, line)) for line in found])
    rounded, exact = reports
    assert exact == [(1, 0, 0), (6, 0, 0)]
    assert rounded[0] == (1, *(pytest.approx(each, rel=0.01) for each in twins_difference(tmp_path)))
    ours, theirs = (json.loads((folder / "tokenizer.json").read_text()) for folder in (tokenizer, tmp_path / "float32"))
    assert ours | {"post_processor": theirs["post_processor"]} == theirs
    assert load_file(tmp_path / "bfloat16/model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
    for source in ("model.pth", "float32"):
        out = tmp_path / "deep" / f"of_{source}"
        options = ["--tokenizer", tokenizer] if source == "model.pth" else []
        run_main(import_checkpoint.main, monkeypatch, tmp_path / source, "--out", out, *options)
        assert_same(model, load_checkpoint(out))
        assert (out / "tokenizer/tokenizer.json").is_file()


def twins_difference(folder: Path) -> tuple[float, float]:
    """What the export is to report at one recurrence, by the twin; at more, weights as wild as these are chaotic."""
    kept, rounded = (torch_reference.load_checkpoint(folder / "model.pth").double() for _ in range(2))
    in_bfloat16 = torch_reference.load_checkpoint(folder / "bfloat16")
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 96, (1, 64), np.int32)).long()
    with torch.no_grad():
        for weight, other in zip(rounded.parameters(), in_bfloat16.parameters(), strict=True):
            weight.copy_(other)
        a_SV, b_SV = (model(tokens, num_steps=(1, 0)).logits[0] for model in (kept, rounded))
    kl_S = torch.nn.functional.kl_div(b_SV.log_softmax(-1), a_SV.log_softmax(-1), log_target=True, reduction="none")
    return (a_SV - b_SV).abs().max().item(), kl_S.sum(-1).max().item()


def test_no_half_made_output_is_left_and_none_is_overwritten(imported, tmp_path, monkeypatch):
    (tmp_path / "out.pth").write_text("mine")
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.iterdir())
    for out, message in (
        ("out.pth", "exists: remove it or name another --out"),
        ("folder", "exists: remove it or name another --out"),
        ("absent/out.pth", "is not a folder"),
        ("absent/folder", "is not a folder"),
        ("model.pt", "neither a .pth file nor a folder"),
    ):
        with pytest.raises(ExportError, match=message):
            run_main(export_main, monkeypatch, imported, "--out", tmp_path / out)
    for run in ("absent", "empty", "out.pth"):
        with pytest.raises(WeightsError, match=f"{run}: "):
            run_main(export_main, monkeypatch, tmp_path / run, "--out", tmp_path / "new.pth")
    with pytest.raises(WeightsError, match="exists: remove it or name another --out"):
        run_main(import_checkpoint.main, monkeypatch, tmp_path / "folder", "--out", imported)
    with pytest.raises(WeightsError, match=r"no tokenizer\.json there"):
        run_main(
            import_checkpoint.main, monkeypatch, tmp_path / "folder", "--out", tmp_path / "new", "--tokenizer", tmp_path
        )
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "out.pth").read_text() == "mine"


def test_damage_that_shows_only_while_weights_are_copied_leaves_no_run(make_config, tmp_path):
    model = random_model(make_config(**KINDS["dense"]))
    write_pth(model, tmp_path / "model.pth")
    whole = bytearray((tmp_path / "model.pth").read_bytes())
    place = whole.index(np.asarray(params_of(model)["adapter"]).T.tobytes())
    whole[place + 7] ^= 1
    (tmp_path / "model.pth").write_bytes(whole)
    weights = read_pth(tmp_path / "model.pth")
    with pytest.raises(WeightsError, match=r"model\.pth: broken \(Bad CRC-32"):
        import_weights(weights, tmp_path / "run")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.pth"]


def test_a_mistake_is_one_line_and_exit_status_2(tmp_path):
    command = [sys.executable, "-m", "jax_huginn.import_checkpoint", "absent.pth", "--out", str(tmp_path / "run")]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 2
    assert answer.stderr.startswith("error: no model at absent.pth: give a run folder, a step folder, ")
    assert answer.stderr.count("\n") == 1


def test_reading_and_importing_need_no_torch(imported, tmp_path):
    """A `.pth` and a bfloat16 folder, in a process in which torch cannot be imported."""
    write_pth(load_checkpoint(imported), tmp_path / "model.pth", dtype="bfloat16")
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from jax_huginn.interop.open_weights import open_weights\n"
        "tensors = lambda path: open_weights(path).tensors.values()\n"
        "print([sum(float(abs(t.read().astype('f')).sum()) for t in tensors(path)) for path in sys.argv[1:]])"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "model.pth"), str(tmp_path / "folder")]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    first, second = json.loads(answer.stdout)
    assert first == pytest.approx(second, rel=1e-2)
