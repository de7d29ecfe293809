"""The plan: its bytes against the compiler on 8 devices, its seconds and bytes against one GPU, and its command."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

import jax_huginn.plan
from jax_huginn.config.checks import ConfigError
from jax_huginn.config.presets import load_config
from jax_huginn.cost import compiled
from jax_huginn.cost.devices import DEVICES
from jax_huginn.cost.plan import Cluster, best_meshes, mean_depth, plan_mesh

ROOT = Path(__file__).parent.parent
XLA_FLAGS = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true --xla_disable_hlo_passes=cse_barrier_expander"
)


def test_bytes_are_the_compilers_on_eight_devices():
    """In a process of its own, as tests/test_parallel.py says."""
    environment = os.environ | {"XLA_FLAGS": XLA_FLAGS, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    file = ROOT / "tests/parallel_cases/compiled_plan.py"
    line = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(file)]
    result = subprocess.run(line, env=environment, capture_output=True, text=True, cwd=ROOT, timeout=600, check=False)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
    assert "skipped" not in result.stdout


# ---- One GPU --------------------------------------------------------------------------------------------------------

H100 = Cluster(DEVICES["h100"], 1, 1)
DOTS = {"remat": "dots", "unroll": True}


def preset(name: str, batch: int, **compute):
    config = load_config(str(ROOT / f"configs/{name}.py"))
    train = dataclasses.replace(config.train, batch_size=batch, micro_batches=1)
    return dataclasses.replace(config, train=train, compute=dataclasses.replace(config.compute, **compute))


# Measured on one H100 80GB, jax 0.11.2, n=25, k=8 (docs/scaling.md).
@pytest.mark.parametrize(
    ("name", "batch", "micro_batches", "compute", "seconds", "gigabytes"),
    [
        ("moe_3_8b", 1, 1, {"remat": "full"}, 1.466, 45.6),
        ("moe_3_8b", 1, 1, DOTS, 1.268, 65.0),
        ("moe_3_8b", 4, 4, {"remat": "full"}, 5.985, 65.4),
        ("moe_3_8b", 4, 4, DOTS | {"remat": "dots_except_gate_up"}, 5.532, 74.6),
        ("moe_700m", 4, 1, DOTS, 0.856, 41.4),
    ],
)
def test_one_gpu_is_predicted_within_a_twentieth(name, batch, micro_batches, compute, seconds, gigabytes):
    config = preset(name, batch, **compute)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, micro_batches=micro_batches))
    plan = plan_mesh(config, H100, (25, 8))
    assert plan.seconds == pytest.approx(seconds, rel=0.05)
    assert plan.memory.total / 1e9 == pytest.approx(gigabytes, rel=0.05)
    assert not plan.traffic


def test_mean_depth_is_the_samplers():
    """The public implementation's means over 200 000 draws are 25.0 and 7.98."""
    n, k = mean_depth(load_config(str(ROOT / "configs/moe_3_8b.py")))
    assert n == pytest.approx(25.0, abs=0.6)
    assert k == pytest.approx(7.98, abs=0.02)


# ---- Meshes ---------------------------------------------------------------------------------------------------------


def test_a_host_of_eight_prefers_its_own_links():
    """On two hosts the state is split within a host and copied between them, rather than split across the network."""
    config = preset("moe_3_8b", 16, remat="full")
    within, across = (
        plan_mesh(
            dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, fsdp=fsdp)), cluster, (25, 8)
        )
        for fsdp, cluster in ((8, Cluster(DEVICES["h100"], 2, 8)), (8, Cluster(DEVICES["h100"], 16, 1)))
    )
    assert within.exchange_seconds < across.exchange_seconds / 4


def test_the_best_meshes_fit_and_come_in_order():
    plans = best_meshes(preset("moe_3_8b", 64), Cluster(DEVICES["h100"], 1, 8), (25, 8), any_micro_batches=True)
    assert len(plans) > 5
    assert all(plan.fits for plan in plans)
    assert plans[0].seconds <= plans[-1].seconds
    assert {plan.config.train.micro_batches for plan in plans} >= {4, 8}


def run(monkeypatch, capsys, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["plan", "--config", str(ROOT / "configs/moe_3_8b.py"), *arguments])
    jax_huginn.plan.main()
    return capsys.readouterr().out


def test_the_command_describes_the_mesh_given(monkeypatch, capsys):
    given = ["--hosts", "1", "--gpus_per_host=8", "--parallel.fsdp", "8", "--train.micro_batches", "512"]
    out = run(monkeypatch, capsys, *given, "--n", "25", "--k", "8")
    assert "data 1 x fsdp 8 x expert 1, micro_batches 512: 1 x 8 H100, 3.82 B parameters" in out
    assert "n 25.0, k 8.00" in out
    assert "gradients: reduce_scatter over fsdp" in out
    assert "assumed to overlap with nothing" in out


def test_the_command_finds_meshes(monkeypatch, capsys):
    out = run(monkeypatch, capsys, "--hosts", "64", "--gpus-per-host", "8", "--n", "25", "--k", "8")
    assert out.splitlines()[0].split()[:3] == ["data", "fsdp", "expert"]
    assert "64 x 8 H100" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--parallel.fsdp", "64", "--gpus-per-host", "64"], "model.width=5280 must be divisible"),
        (["--parallel.fsdp", "3", "--gpus-per-host", "8"], "3 does not divide the 8 device"),
        (["--parallel.fsdp", "8", "--gpus-per-host", "8"], "train.micro_batches may be 512"),
        (["--gpus-per-host", "8", "--train.micro_batches", "4096"], "train.micro_batches may be 512"),
        (["--optimizer.moment_dtype", "float32"], "needs 79.1 GB on each device, of it 30.6 GB moments; a H100 has 78"),
        (["--parallel.data", "1", "--memory-gb", "40"], "a H100 has 40 GB"),
        (["--gpu-per-host", "8"], "unknown option --gpu-per-host; did you mean --gpus-per-host?"),
        (["--train.micro_batch", "8"], "did you mean --train.micro_batches?"),
        (["--hosts", "0"], "--hosts 0 must be positive"),
        (["--network-gbs", "-1"], "--network-gbs -1.0 must be positive"),
        (["--k", "9"], "recurrence.backprop_depth=8"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(monkeypatch, capsys, arguments, words):
    with pytest.raises(ConfigError) as caught:
        run(monkeypatch, capsys, *arguments)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- The compiler's account -----------------------------------------------------------------------------------------


def test_compile_without_jaxs_plugin_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(compiled, "find_spec", lambda name: None)
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
    assert compiled.overlapped(text) == {"all-gather": 0.5}


def test_every_device_of_the_plan_is_described_to_the_compiler():
    for device in DEVICES.values():
        text = compiled.describe_chip(device)
        assert f'"NVIDIA {device.kind}"' in text
        memory = int(text.split("device_memory_size: ")[1].split()[0])
        assert memory * compiled.XLA_SHARE == pytest.approx(device.memory_gb * 1e9)
