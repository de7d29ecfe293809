"""One resolver for everything that holds a model."""

import jax
import numpy as np
import pytest
from flax import nnx

from jax_huginn.checkpoints.import_run import import_weights
from jax_huginn.checkpoints.sources import load_checkpoint, load_for_inference, open_source
from jax_huginn.config.checks import UserError
from jax_huginn.interop.huggingface import write_huggingface
from jax_huginn.interop.open_weights import open_weights
from jax_huginn.interop.pth import write_pth
from jax_huginn.model.huginn import MoEHuginnModel
from tests.support import small_config

KINDS = ("run", "run/checkpoints", "run/checkpoints/0", "model.pth", "hf")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """The same model in every form."""
    folder = tmp_path_factory.mktemp("sources")
    model = MoEHuginnModel(small_config(), seed=3)
    write_pth(model, folder / "model.pth")
    write_huggingface(model, folder / "hf")
    import_weights(open_weights(folder / "model.pth"), folder / "run")
    return folder, nnx.as_pure(nnx.split(model)[1])


@pytest.mark.parametrize("kind", KINDS)
def test_every_form_gives_the_same_model(places, kind):
    folder, params = places
    loaded = load_checkpoint(folder / kind)
    jax.tree.map(np.testing.assert_array_equal, nnx.as_pure(nnx.split(loaded)[1]), params)


@pytest.mark.parametrize("kind", ["run", "model.pth", "hf"])
def test_weights_are_read_straight_into_the_type_of_inference(places, kind):
    folder, params = places
    model = load_for_inference(open_source(folder / kind), "bfloat16")
    loaded = nnx.as_pure(nnx.split(model)[1])
    assert model.config.model.dtype == "bfloat16"
    assert loaded["wte"].dtype == "bfloat16"
    assert loaded["moe"]["router"].dtype == "float32"  # the router computes in at least float32
    np.testing.assert_array_equal(loaded["wte"], params["wte"].astype("bfloat16"))


def test_digests_tell_models_apart(places, tmp_path):
    folder, _ = places
    other = MoEHuginnModel(small_config(), seed=4)
    write_pth(other, tmp_path / "other.pth")
    digests = {kind: open_source(folder / kind).digest() for kind in ("run", "model.pth", "hf")}
    assert digests["run"] == open_source(folder / "run/checkpoints/0").digest()
    assert open_source(tmp_path / "other.pth").digest() not in digests.values()
    assert all(len(digest) == 64 for digest in digests.values())


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("nothing.pth", ["nothing.pth", "run folder", "hub"]),
        ("no/such/folder", ["no/such/folder", "run folder"]),
        ("owner/name", ["owner/name", "none from the hub"]),  # tests are offline
        ("x y", ["no model at x y"]),
    ],
)
def test_what_holds_no_model_is_one_line(monkeypatch, tmp_path, source, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        open_source(source)
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)
