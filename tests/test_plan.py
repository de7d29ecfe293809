"""The plan: its bytes against the compiler on 8 devices, its seconds and bytes against one GPU, and its command."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

import jax_huginn.plan
from jax_huginn.config.checks import ConfigError
from jax_huginn.config.overrides import override
from jax_huginn.config.presets import load_config
from jax_huginn.config.schema import Config
from jax_huginn.cost import xla
from jax_huginn.cost.devices import DEVICES
from jax_huginn.cost.memory import state_arrays
from jax_huginn.cost.plan import Cluster, Plan, best_plans, mean_depth
from jax_huginn.cost.roofline import step_work
from jax_huginn.parallel.mesh import AXES
from tests.support import HANGS

ROOT = Path(__file__).parent.parent
XLA_FLAGS = "--xla_force_host_platform_device_count=8 --xla_disable_hlo_passes=cse_barrier_expander"


def test_bytes_are_the_compilers_on_eight_devices():
    """In a process of its own, as tests/test_parallel.py says."""
    flags = f"{os.environ['XLA_FLAGS']} {XLA_FLAGS}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    file = ROOT / "tests/parallel_cases/compiled_plan.py"
    line = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(file)]
    result = subprocess.run(line, env=environment, capture_output=True, text=True, cwd=ROOT, timeout=HANGS, check=False)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
    assert "skipped" not in result.stdout


# ---- Measured and compiled steps ------------------------------------------------------------------------------------

DEPTH = (25, 8)
SETTINGS = ["--compute.remat", "dots", "--compute.unroll", "true"]


def preset(name: str, *overrides: str, sequences: int = 1, micro_batches: int = 1) -> Config:
    train = ["--train.batch_size", str(sequences * micro_batches), "--train.micro_batches", str(micro_batches)]
    return override(load_config(str(ROOT / f"configs/{name}.py")), [*train, *overrides])


def plan_of(config: Config, devices: int = 1, per_host: int = 8) -> Plan:
    """The one plan of a config on H100s, searching nothing."""
    cluster = Cluster(DEVICES["h100"], -(-devices // per_host), min(devices, per_host))
    (plan,) = best_plans(config, cluster, DEPTH, search=())
    return plan


# One H100 80GB, jax 0.11.2: benchmarks/results/train_step.jsonl, commit ce1faca.
@pytest.mark.parametrize(
    ("name", "sequences", "micro_batches", "remat", "seconds", "gigabytes"),
    [
        ("moe_3_8b", 1, 1, "full", 1.466, 45.6),
        ("moe_3_8b", 1, 1, "dots", 1.268, 65.0),
        ("moe_3_8b", 1, 4, "full", 5.985, 65.4),
        ("moe_3_8b", 1, 4, "dots_except_gate_up", 5.532, 74.6),
        ("moe_700m", 4, 1, "dots", 0.856, 41.4),
    ],
)
def test_measured_steps_are_predicted_within_a_twentieth(name, sequences, micro_batches, remat, seconds, gigabytes):
    settings = ["--compute.remat", remat, "--compute.unroll", "true"]
    plan = plan_of(preset(name, *settings, sequences=sequences, micro_batches=micro_batches))
    assert plan.seconds == pytest.approx(seconds, rel=0.05)
    assert plan.memory.total / 1e9 == pytest.approx(gigabytes, rel=0.05)
    assert not plan.exchanges


def test_the_rates_explain_the_profile():
    """Seconds of a profile of the 3.8 B step, one H100 80GB (docs/performance.md, commit c182336)."""
    profile = {"matmuls": 0.982, "attention": 0.127, "elementwise and optimiser": 0.159}
    assert plan_of(preset("moe_3_8b", *SETTINGS)).compute_seconds == pytest.approx(profile, rel=0.04)


def test_the_rates_explain_a_step_in_8_bits():
    """A profile of the 3.8 B step with `compute.fp8`, one H100 80GB (docs/performance.md)."""
    plan = plan_of(preset("moe_3_8b", *SETTINGS, "--compute.fp8", "true"))
    profile = {"matmuls": 0.596, "attention": 0.122, "elementwise and optimiser": 0.271}
    assert plan.compute_seconds == pytest.approx(profile, rel=0.05)
    assert plan.seconds == pytest.approx(1.006, rel=0.05)
    assert plan.memory.total / 1e9 == pytest.approx(67.9, rel=0.05)


COMPILED = [json.loads(line) for line in (ROOT / "benchmarks/results/compiled_memory.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "case", COMPILED, ids=lambda case: f"{case['config']} {case['settings'][1]} {case['mesh']} {case['micro_batches']}"
)
def test_memory_is_the_gpu_compilers_within_a_tenth(case):
    devices = math.prod(case["mesh"])
    mesh = [word for axis, size in zip(AXES, case["mesh"], strict=True) for word in (f"--parallel.{axis}", str(size))]
    sequences = case["at_once"] * devices
    config = preset(case["config"], *case["settings"], *mesh, sequences=sequences, micro_batches=case["micro_batches"])
    assert plan_of(config, devices).memory.total / 1e9 == pytest.approx(case["compiled_gb"], rel=0.1)


def test_muon_is_counted():
    """Five Newton-Schulz steps of 4 m^2 n + 2 m^3 FLOPs for an m x n matrix, in TF32 at half of bfloat16's rate."""
    small = [
        "--model.core_layers",
        "1",
        "--model.prelude_layers",
        "0",
        "--model.coda_layers",
        "0",
        "--moe.experts",
        "0",
    ]
    adamw, muon = (preset("moe_3_8b", *small, "--optimizer.name", name) for name in ("adamw", "muon"))
    d, f = 5280, 17920
    shapes = [(d, 2 * d), (d, 3 * d), (d, d), (d, 2 * f), (d, f)]  # adapter, w_qkv, w_out, w_fc, w_proj
    flops = sum(5 * (4 * m**2 * n + 2 * m**3) for m, n in shapes)
    work = [step_work(config, (1, 1, 1), state_arrays(config), *DEPTH).matmul for config in (adamw, muon)]
    assert work[1] - work[0] == pytest.approx(2 * flops, rel=1e-9)


def test_mean_depth_is_the_samplers():
    """The public implementation's means over 200 000 draws are 25.0 and 7.98."""
    n, k = mean_depth(load_config(str(ROOT / "configs/moe_3_8b.py")))
    assert n == pytest.approx(25.0, abs=0.6)
    assert k == pytest.approx(7.98, abs=0.02)


# ---- Search ---------------------------------------------------------------------------------------------------------


def test_a_host_of_eight_prefers_its_own_links():
    """The same mesh costs several times more exchange time where its parts lie on different hosts."""
    config = preset("moe_3_8b", "--compute.remat", "full", "--parallel.fsdp", "8", sequences=16)
    within, across = (plan_of(config, 16, per_host) for per_host in (8, 1))
    assert within.exchange_seconds < across.exchange_seconds / 4


def test_the_best_plans_fit_and_come_in_order():
    plans = best_plans(preset("moe_3_8b", sequences=64), Cluster(DEVICES["h100"], 1, 8), DEPTH)
    assert len(plans) > 5
    assert all(plan.fits for plan in plans)
    assert plans[0].seconds <= plans[-1].seconds
    assert {plan.config.train.micro_batches for plan in plans} >= {2, 4, 8}
    assert {plan.config.compute.remat for plan in plans} >= {"dots", "full"}
    assert plans[0].config.compute.remat == "dots"  # `full` recomputes more than it needs to


def run(monkeypatch, capsys, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["plan", "--config", str(ROOT / "configs/moe_3_8b.py"), *arguments])
    jax_huginn.plan.main()
    return capsys.readouterr().out


def test_the_command_describes_what_is_given(monkeypatch, capsys):
    given = ["--hosts", "1", "--gpus_per_host=8", "--parallel.fsdp", "8", "--train.micro-batches", "512"]
    out = run(monkeypatch, capsys, *given, "--compute.remat", "full", "--n", "25", "--k", "8")
    assert out.startswith("data 1 x fsdp 8 x expert 1, micro_batches 512, remat full: 1 x 8 H100, 3.82 B parameters\n")
    assert "n 25.0, k 8.00" in out
    assert "gradients: reduce_scatter over fsdp" in out
    assert "assumed to overlap with nothing" in out


def test_days_and_gpu_hours_are_those_of_all_steps(monkeypatch, capsys):
    given = ["--gpus-per-host", "8", "--parallel.fsdp", "8", "--train.micro_batches", "256", "--compute.remat", "dots"]
    out = run(monkeypatch, capsys, *given, "--train.steps", "1000")
    seconds = float(out.split("sum")[-1].split()[0])
    days, hours = 1000 * seconds / 86_400, 1000 * seconds / 3600 * 8
    assert f"train.steps=1000 take {days:.3g} days, {hours:.3g} GPU-hours, for 16.8 B tokens" in out


def test_the_command_searches_what_is_left_open(monkeypatch, capsys):
    out = run(monkeypatch, capsys, "--hosts", "64", "--gpus-per-host", "8", "--n", "25", "--k", "8")
    assert out.splitlines()[0].split()[:5] == ["data", "fsdp", "expert", "micro_batches", "remat"]
    assert "64 x 8 H100" in out
    given = run(monkeypatch, capsys, "--gpus-per-host", "8", "--parallel.fsdp", "8", "--n", "25", "--k", "8")
    rows = [line.split() for line in given.splitlines()[1:6]]
    assert {tuple(row[:3]) for row in rows} == {("1", "8", "1")}
    assert len({row[3] for row in rows}) > 1
    assert len({row[4] for row in rows}) > 1


def test_a_peak_and_other_figures_may_be_given_by_hand(monkeypatch, capsys):
    given = ["--parallel.data", "1", "--train.micro_batches", "4096", "--compute.remat", "full", "--device", "b200"]
    known = run(monkeypatch, capsys, *given)
    assert "1 x 1 B200" in known
    by_hand = run(monkeypatch, capsys, *given, "--peak-tflops", "1125", "--memory-gbs", "4000")
    seconds = [float(out.split("sum")[-1].split()[0]) for out in (known, by_hand)]
    assert seconds[1] == pytest.approx(2 * seconds[0], rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--parallel.fsdp", "64", "--gpus-per-host", "64"], "model.width=5280 must be divisible"),
        (["--parallel.fsdp", "3", "--gpus-per-host", "8"], "3 does not divide the 8 device"),
        (["--gpus-per-host", "8", "--train.micro_batches", "4096"], "train.micro_batches may be 512"),
        (["--compute.remat", "full", "--optimizer.moment_dtype", "float32"], "needs 79.1 GB on each device, 30.6 GB"),
        (["--parallel.data", "1", "--memory-gb", "40"], "a program may fill 40 GB of H100"),
        (["--gpu-per-host", "8"], "unknown option --gpu-per-host; did you mean --gpus-per-host?"),
        (["--train.micro_batch", "8"], "did you mean --train.micro_batches?"),
        (["--hosts", "0"], "--hosts 0 must be positive"),
        (["--network-gbs", "-1"], "--network-gbs -1.0 must be positive"),
        (["--k", "9"], "recurrence.backprop_depth=8"),
    ],
)
def test_what_is_impossible_is_refused_in_one_line(monkeypatch, capsys, arguments, words):
    with pytest.raises(ConfigError) as caught:
        run(monkeypatch, capsys, *arguments)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- The compiler's account -----------------------------------------------------------------------------------------


def test_compile_is_for_nvidia_alone(monkeypatch, capsys):
    given = ["--parallel.data", "1", "--train.micro_batches", "4096", "--device", "mi300x", "--compile"]
    with pytest.raises(ConfigError, match=r"^--compile is for NVIDIA GPUs \(H100, H200, B200, A100\), not for MI300X$"):
        run(monkeypatch, capsys, *given)


def test_compile_without_jaxs_plugin_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(xla, "find_spec", lambda name: None)
    given = ["--parallel.fsdp", "8", "--gpus-per-host", "8", "--train.micro_batches", "512", "--compile"]
    with pytest.raises(ConfigError, match=r"^--compile needs XLA's compiler for NVIDIA GPUs.*pip install"):
        run(monkeypatch, capsys, *given)


def test_share_of_exchanges_that_computation_may_hide():
    """Gathers: 400 MB while a matmul runs, 200 MB while nothing does, 200 MB at a stop. Small sums are left out."""
    text = """
  %a.1 = (bf16[10000,10000]{1,0}, bf16[20000,10000]{1,0}) all-gather-start(%x), channel_id=1
  %dot.1 = bf16[10,10]{1,0} custom-call(%y)
  %b.1 = bf16[20000,10000]{1,0} all-gather-done(%a.1)
  %a.2 = (bf16[5000,10000]{1,0}, bf16[10000,10000]{1,0}) all-gather-start(%x), channel_id=1
  %b.2 = bf16[10000,10000]{1,0} all-gather-done(%a.2)
  ROOT %c = (f32[5000,10000]{1,0}) all-gather(%x), channel_id=2
  %d = f32[41]{0} all-reduce(%x), channel_id=3
"""
    assert xla.overlapped(text) == {"all-gather": 0.5}


def test_every_nvidia_device_is_described_to_the_compiler():
    assert {device.kind for device in DEVICES.values()} - xla.CHIPS.keys() == {"MI300X"}
    for device in (device for device in DEVICES.values() if device.kind in xla.CHIPS):
        text = xla.describe_chip(device)
        assert f'"NVIDIA {device.kind}"' in text
        memory = int(text.split("device_memory_size: ")[1].split()[0])
        assert memory * xla.XLA_SHARE == pytest.approx(device.memory_gb * 1e9)
