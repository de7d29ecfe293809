"""`--profile.steps`: a trace that opens in TensorBoard and Perfetto, of the steps asked for; bad ranges are refused."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest

from jax_huginn.config.checks import ConfigError
from jax_huginn.config.schema import ProfileConfig
from jax_huginn.reporting.trace import Trace


def calls_in_trace(folder, steps: str) -> int:
    """Events of the step's calls in a trace of some of four steps; a call is one event or several nested ones."""
    trace = Trace(ProfileConfig(steps), folder)
    step = jax.jit(lambda x: jnp.sin(x @ x))
    x, complete = step(jnp.ones((64, 64))), []
    for number in range(1, 5):
        trace.before(number, x)
        x = step(x)
        complete.append(trace.after(number, x))
    assert complete == [number == trace.steps[-1] for number in range(1, 5)]
    assert list(trace.folder.rglob("*.xplane.pb"))
    (perfetto,) = trace.folder.rglob("perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(perfetto.read_bytes()))["traceEvents"]
    return sum("PjitFunction(<lambda>)" in event.get("name", "") for event in events)


def test_the_steps_asked_for_are_traced(tmp_path):
    one, three = calls_in_trace(tmp_path / "one", "2:2"), calls_in_trace(tmp_path / "three", "2:4")
    assert one > 0
    assert three == 3 * one


def test_a_run_that_ends_early_closes_its_trace(tmp_path):
    trace = Trace(ProfileConfig("1:9"), tmp_path)
    trace.before(1, None)
    trace.close()
    assert list(trace.folder.rglob("*.xplane.pb"))


@pytest.mark.parametrize("steps", ["5-6", "6:5", "0:3", "a:b", ":", "1:2:3"])
def test_no_range_of_steps_is_refused(steps):
    with pytest.raises(ConfigError, match=r"profile\.steps"):
        ProfileConfig(steps)
