"""Every recurrence on the way is what a forward pass of that depth gives, and the page says it of the right token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_huginn.config.checks import UserError
from jax_huginn.inference.iterations import return_iterations
from jax_huginn.model import functional
from jax_huginn.trajectories import look
from jax_huginn.visualization.page import write_page
from jax_huginn.visualization.trajectory_charts import sections
from tests.support import random_model, small_config

DEPTH = 3


class Letters:
    """A tokenizer whose tokens are the characters from the space on."""

    bos_token_id = 95

    def __len__(self) -> int:
        return 96

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [ord(letter) - 32 for letter in text]

    def decode(self, tokens: list[int]) -> str:
        return "".join(chr(token + 32) for token in tokens)


@pytest.fixture(scope="module")
def model():
    config = small_config(model={"dtype": "float64", "param_dtype": "float64", "core_layers": 1}, moe={"experts": 0})
    graphdef, params = functional.split(random_model(config))
    return nnx.merge(graphdef, jax.tree.map(lambda leaf: 0.3 * leaf, params))  # at 1 the recurrence amplifies rounding


def test_every_recurrence_is_a_forward_pass_of_that_depth(model):
    tokens_BS = np.array([[95, 3, 7, 7, 60, 1]])  # as many as the page's test has, so that one program serves both
    found = return_iterations(model, jnp.asarray(tokens_BS), DEPTH, top=3)
    forward = jax.jit(lambda depth: model(jnp.asarray(tokens_BS), num_steps=(depth, 0)))
    for depth in range(1, DEPTH + 1):
        out = forward(depth)
        states_BSD = found.states_RBSD[depth - 1]
        assert np.allclose(model.norm_f(states_BSD), out.latents, rtol=0, atol=1e-10)
        log_p_BSV = np.asarray(out.logits - np.logaddexp.reduce(out.logits, axis=-1, keepdims=True))
        best = np.argsort(-log_p_BSV, axis=-1)[..., :3]
        assert np.array_equal(found.top_tokens[depth - 1], best)
        assert np.allclose(found.top_log_p[depth - 1], np.take_along_axis(log_p_BSV, best, -1), rtol=0, atol=1e-10)
        assert np.allclose(found.entropy_RBS[depth - 1], -(np.exp(log_p_BSV) * log_p_BSV).sum(-1), rtol=0, atol=1e-10)
        following = np.take_along_axis(log_p_BSV[:, :-1], tokens_BS[:, 1:, None], -1)[..., 0]
        assert np.allclose(found.loss_RBS[depth - 1, :, :-1], -following, rtol=0, atol=1e-10)
        assert np.isnan(found.loss_RBS[depth - 1, :, -1]).all()


def test_the_page_shows_predictions_distances_and_paths(model, tmp_path):
    seen = look(model, Letters(), "a <b>", DEPTH, top=3)
    assert list(seen.tokens) == ["�", "a", "·", "<", "b", ">"]
    charts = {chart.key: chart for section in sections(seen) for chart in section.charts}
    assert set(charts) == {
        "predictions", "loss_by_recurrence", "entropy_by_recurrence", "distance", "moved", "state_norm", "paths_1_2",
        "paths_3_4",
    }  # fmt: skip
    predictions = charts["predictions"]
    assert predictions.rows[0] == "5 >"  # the first row is drawn at the bottom
    assert predictions.text[0][1] == seen.top[1][5][0][0]
    assert predictions.values[0, 1] == seen.top[1][5][0][1]
    distance_RS = np.linalg.norm(seen.states_RSD - seen.states_RSD[-1], axis=-1)
    expected = np.log10(distance_RS[0, 5] / np.linalg.norm(seen.states_RSD[-1, 5]))
    assert charts["distance"].values[0, 0] == pytest.approx(expected)
    path = charts["paths_1_2"].series[5]
    assert path.x[-1] == path.y[-1] == 0
    away = seen.states_RSD - seen.states_RSD[-1]
    assert np.abs(path.x).max() <= np.linalg.norm(away[:, 5], axis=-1).max() + 1e-9
    write_page(tmp_path / "page.html", "Trajectories", "", sections(seen), {})
    assert "<b>" not in (tmp_path / "page.html").read_text().split('id="figures">')[1].split("</script>")[0]


def test_a_prompt_that_does_not_fit_is_refused(model):
    with pytest.raises(UserError, match="129 tokens with BOS: the model reads 1 to 128"):
        look(model, Letters(), "a" * 128, DEPTH, top=1)
    with pytest.raises(UserError, match="more than the model's 96"):
        look(model, Letters(), "\x80\x81", DEPTH, top=1)
