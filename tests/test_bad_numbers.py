"""Losses and gradients that are not finite skip the update; a streak of them stops the run; warnings come once."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jax_huginn.model.huginn import MoEHuginnModel, TrainingLoss
from jax_huginn.reporting.alarms import Alarms, BadNumbersError
from jax_huginn.training import loop
from jax_huginn.training.depth import sample_depths
from jax_huginn.training.loop import train
from jax_huginn.training.step import init_state, make_train_step

POISON = 299  # a token that no tokenizer of these tests gives


@pytest.fixture
def poisonous(monkeypatch):
    """A stand-in for the model that compiles in no time: the tokens' embeddings shrink.

    A micro-batch that holds the poison has a gradient that is nan and a loss that is finite.
    """

    def training_loss(self, tokens_BS, *_):
        loss = jnp.mean(self.wte[...][tokens_BS] ** 2)
        # The root of nothing is nothing; its derivative is infinite, and times 0 it is nan.
        root = jnp.sqrt(jnp.where((tokens_BS == POISON).any(), loss - lax.stop_gradient(loss), 1.0))
        return TrainingLoss(loss + 0 * root, loss, None, {})

    monkeypatch.setattr(MoEHuginnModel, "training_loss", training_loss)


def config_of(make_config, **train):
    return make_config(
        model={"vocab_size": 300, "width": 16, "heads": 2, "kv_heads": 2, "core_layers": 1, "prelude_layers": 0,
               "coda_layers": 0, "max_length": 32},
        moe={"experts": 2, "active": 1, "width": 8},
        recurrence={"mean": 2, "backprop_depth": 1},
        train={"batch_size": 4, "micro_batches": 2, "sequence_length": 32, **train},
        optimizer={"warmup_steps": 1},
    )  # fmt: skip


@pytest.mark.parametrize("optimizer", ["adamw", "adam_atan2", "muon"])
def test_a_bad_micro_batch_leaves_weights_and_optimiser_as_they_were(make_config, poisonous, optimizer):
    config = config_of(make_config)
    decay = 1e-4 if optimizer == "adam_atan2" else None
    config = dataclasses.replace(
        config, optimizer=dataclasses.replace(config.optimizer, name=optimizer, weight_decay=decay)
    )
    step = jax.jit(make_train_step(config), donate_argnums=0)
    rows = np.random.default_rng(0).integers(0, POISON, (4, 33)).astype(np.int32)
    bad = rows.copy()
    bad[2, 5] = POISON  # in the second micro-batch

    def advance(state, rows):
        return step(state, rows[:, :-1], rows[:, 1:], *sample_depths(config.recurrence, 0, 0, 2))

    state, metrics = advance(jax.jit(lambda: init_state(config))(), rows)
    assert metrics.finite_U.tolist() == [True, True] and int(metrics.skipped) == 0
    before = jax.device_get(state)
    state, metrics = advance(state, bad)
    assert metrics.finite_U.tolist() == [True, False]
    assert math.isnan(float(metrics.grad_norm)) and math.isfinite(float(metrics.objective))
    after = jax.device_get(state)
    jax.tree.map(np.testing.assert_array_equal, (after.params, after.opt_state), (before.params, before.opt_state))
    assert (int(after.step), int(after.skipped)) == (2, 1)

    state, metrics = advance(state, rows)  # the rate follows the updates, not the steps
    assert int(metrics.skipped) == 1
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), state.params, before.params)
    assert any(jax.tree.leaves(moved))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def test_a_run_skips_counts_stops_after_a_streak_and_resumes(make_config, poisonous, tmp_path, monkeypatch, capsys):
    """Bad batches at steps 2, 6, 7 and 8; three in a row end the run, whose last checkpoint is step 4."""
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/a.txt").write_text("a quick brown fox " * 500)
    config = config_of(make_config, steps=9, max_skipped=3)
    config = dataclasses.replace(
        config,
        run_dir=str(tmp_path / "run"),
        data=dataclasses.replace(config.data, source="text", path=str(tmp_path / "corpus"), validation_fraction=0,
                                 streams=1, shuffle_window=1),
        checkpoint=dataclasses.replace(config.checkpoint, every=4),
        log=dataclasses.replace(config.log, tensorboard=False),
    )  # fmt: skip
    bad_steps = {2, 6, 7, 8}

    def poisoned(config, mesh):
        healthy = make_train_step(config, mesh)

        def step(state, tokens_BS, *rest):
            bad = jnp.isin(state.step + 1, jnp.array(sorted(bad_steps)))
            return healthy(state, tokens_BS.at[:1].set(jnp.where(bad, POISON, tokens_BS[:1])), *rest)

        return step

    def traced(*arguments, **options):
        data = loop_build_data(*arguments, **options)
        data.train.locate = lambda row: f"place {row}"
        return data

    loop_build_data = loop.build_data
    monkeypatch.setattr(loop, "build_data", traced)
    monkeypatch.setattr(loop, "jit_train_step", lambda *of: jax.jit(poisoned(*of), donate_argnums=0))
    with pytest.raises(BadNumbersError) as stopped:
        train(config)
    (line,) = str(stopped.value).splitlines()
    assert line.startswith("step 8: micro-batch 0 has a loss or a gradient that is not finite (rows 28 to 29 of the")
    assert "training sequence: place 28; place 29);" in line  # the hook gets the position before the batch
    assert "3 updates in a row" in line and "the last good checkpoint is step 4" in line
    printed = capsys.readouterr().out
    assert printed.count("warning: ") == 2  # a line an episode
    assert "warning: step 2: micro-batch 0 " in printed and "warning: step 6: " in printed
    records = read(tmp_path)
    assert [record["skipped_updates"] for record in records] == [0, 1, 1, 1, 1, 2, 3, 4]
    assert [record.get("non_finite") for record in records] == [None, [0], None, None, None, [0], [0], [0]]

    bad_steps -= {7}  # a good step, so the streak ends
    train(config)
    records = read(tmp_path)
    assert [record["skipped_updates"] for record in records] == [0, 1, 1, 1, 1, 2, 2, 3, 3]
    assert "resuming" in capsys.readouterr().out


def read(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]


def test_weights_that_are_not_finite_are_not_saved(make_config):
    alarms = Alarms(make_config(), print, lambda: 2)
    alarms.require_finite({"step": 3, "param_norm": 2.0})
    for norm in (math.nan, math.inf):
        with pytest.raises(BadNumbersError, match=r"step 3: the weights are not finite.* checkpoint is step 2"):
            alarms.require_finite({"step": 3, "param_norm": norm})


# ---- Warnings -------------------------------------------------------------------------------------------------------


@pytest.fixture
def watched(make_config):
    said: list[str] = []
    alarms = Alarms(make_config(), said.append, lambda: None)

    def see(loss: float, depth: int = 4, **more) -> list[str]:
        said.clear()
        see.step += 1
        alarms.see({"step": see.step, "loss": loss, "n": depth - 2, "k": 2, **more})
        return list(said)

    see.step = 0
    return see


def test_a_spike_is_reported_once_an_episode(watched):
    random = np.random.default_rng(0)
    calm = lambda: 3 + 0.05 * random.standard_normal()  # noqa: E731
    assert all(watched(calm()) == [] for _ in range(300))
    (line,) = watched(4.0)
    assert line.startswith("warning: step 301: loss 4.0000 is a spike: the median of the last 100 steps of this")
    assert " depth or less is 2.98" in line
    assert watched(4.5) == []
    assert all(watched(calm()) == [] for _ in range(5))
    assert len(watched(4.0)) == 1
    assert watched(math.nan) == []


def test_a_shallow_step_of_a_task_that_needs_depth_is_no_spike(watched):
    """Three recurrences leave the task unsolved, and are sampled in one step of twenty."""
    random = np.random.default_rng(0)
    depths = [3 if step % 20 == 19 else int(random.integers(8, 60)) for step in range(400)]
    assert all(watched(2.0 if depth == 3 else 0.01 + 0.001 * random.random(), depth) == [] for depth in depths)
    assert len(watched(2.0, 50)) == 1


def test_a_falling_loss_and_a_few_first_steps_are_no_spike(watched):
    assert watched(10.0) == watched(30.0) == []
    assert all(watched(8 * 0.99**step + 0.3 * (step % 3)) == [] for step in range(300))


def test_a_collapsed_router_is_reported_once_an_episode(watched):
    collapsed = {"router_collapse_warning": True, "expert_counts": [3, 90, 7], "top_expert_usage_pct": 90.0}
    fine = {**collapsed, "router_collapse_warning": False}
    assert watched(3.0, **fine) == []
    assert watched(3.0, **collapsed) == [
        "warning: step 2: the router collapses: expert 1 gets 90 % of the assignments, more than 50 %"
    ]
    assert watched(3.0, **collapsed) == watched(3.0) == watched(3.0, **collapsed) == watched(3.0, **fine) == []
    assert len(watched(3.0, **collapsed)) == 1
