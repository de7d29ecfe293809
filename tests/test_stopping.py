"""When a run stops: signals, the job's end, and lengths of time as people write them."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jax_huginn.config.checks import ConfigError, seconds_of
from jax_huginn.config.schema import CheckpointConfig
from jax_huginn.training.stopping import Deadline, Stop, deadline_of

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("300", 300), ("300s", 300), ("5m", 300), ("1h30m", 5400), ("1h", 3600), ("2d1h1m1s", 176_461), ("0", 0)],
)
def test_lengths_of_time(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "5x", "-5m", "1m5h", "1.5h", " 5m", "5 m", "٣m", "5m\n"])
def test_what_is_no_length_of_time_is_one_line(text):
    assert seconds_of(text) is None
    if text:
        with pytest.raises(ConfigError, match="is not a length of time: write 300, 300s, 5m or 1h30m"):
            CheckpointConfig(save_before_timeout=text)


def test_the_job_s_end_is_slurms_or_counted_from_the_start():
    assert deadline_of(CheckpointConfig()) is None
    now = time.time()
    options = CheckpointConfig(save_before_timeout="5m")
    slurm = deadline_of(options, {"SLURM_JOB_END_TIME": str(int(now) + 1000)})
    assert slurm and slurm.at == int(now) + 700
    limited = dataclasses.replace(options, time_limit="10m")
    counted = deadline_of(limited, {})
    assert counted and counted.at == pytest.approx(now + 300, abs=5)
    both = deadline_of(limited, {"SLURM_JOB_END_TIME": str(int(now) + 400)})
    assert both and both.at == int(now) + 100


@pytest.mark.parametrize(
    ("options", "environment", "words"),
    [
        ({}, {}, "give --checkpoint.time_limit, for example 24h"),
        ({}, {"SLURM_JOB_END_TIME": "soon"}, "SLURM_JOB_END_TIME=soon is not a time in seconds"),
        ({"time_limit": "4m"}, {}, "leaves no time: the job ends in 240 s"),
        ({}, {"SLURM_JOB_END_TIME": "1000"}, "the job ends in 0 s"),
    ],
)
def test_a_deadline_that_cannot_be_is_one_line(options, environment, words):
    with pytest.raises(ConfigError, match=words):
        deadline_of(CheckpointConfig(save_before_timeout="5m", **options), environment)


def test_a_time_limit_alone_is_refused():
    with pytest.raises(ConfigError, match=r"time_limit=24h needs checkpoint.save_before_timeout"):
        CheckpointConfig(time_limit="24h")


def test_the_first_request_counts_and_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with Stop() as stop:
        assert not stop.requested()
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested() == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is before
    clock = iter([1.0, 94.0, 95.0])
    with Stop(Deadline(100.0, "5s", lambda: next(clock))) as stop:
        assert [stop.requested() for _ in range(3)] == [None, None, "the job's end in 5s"]
    with Stop(agree=lambda reason: reason or "another process") as stop:
        assert stop.requested() == "another process"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_the_process_at_once(number):
    """Even where Python has no turn, as within a compiled step: here within a lock's wait without a timeout."""
    program = """
import ctypes, sys
from jax_huginn.training.stopping import Stop
with Stop() as stop:
    print("ready", flush=True)
    while not stop.received:
        pass
    print("asked", flush=True)
    ctypes.PyDLL(None).sleep(60)  # holds the interpreter
"""
    line = [sys.executable, "-c", program]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.stdout.readline() == "asked\n"
        process.send_signal(number)
        assert process.wait(10) == -number


def test_ctrl_c_before_the_first_step_is_no_traceback(tmp_path):
    program = """
import signal, time
from jax_huginn.config.cli import run_verb
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
print("on", flush=True)
run_verb(lambda: time.sleep(60))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGINT)
    assert (process.communicate(timeout=20)[1], process.returncode) == ("interrupted\n", 130)
