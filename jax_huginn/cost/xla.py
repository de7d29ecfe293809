"""Memory and overlap of a training step as XLA compiles it for NVIDIA GPUs that need not be here.

XLA compiles for a described GPU (`jax.experimental.topologies`). Nothing runs, so no kernel is chosen by timing it;
otherwise the program is that of a real run.
"""

import dataclasses
import re
from collections import defaultdict
from importlib.util import find_spec
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.stages import Lowered

from jax_huginn.config.checks import ConfigError, require
from jax_huginn.config.schema import Config
from jax_huginn.cost.devices import Device
from jax_huginn.cost.plan import Cluster
from jax_huginn.model.sharding import shardings
from jax_huginn.ops.attention import resolve
from jax_huginn.parallel.mesh import BATCH, REPLICATED, make_mesh
from jax_huginn.training.step import init_state, jit_train_step

PLUGINS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")

# Data sheets: streaming multiprocessors, bytes of shared memory of one and of a block in it, bytes of L2, GHz, FP32
# units of a multiprocessor, compute capability.
CHIPS = {
    "H100": (132, 233472, 232448, 52428800, 1.98, 128, 9),
    "H200": (132, 233472, 232448, 52428800, 1.98, 128, 9),
    "B200": (148, 233472, 232448, 132644864, 1.965, 128, 10),
    "A100": (108, 167936, 166912, 41943040, 1.41, 64, 8),
}
LEAST = 10**8  # bytes of a kind of collective below which its overlap is not reported
XLA_SHARE = 0.8  # of a described device's memory that XLA gives to the program


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The compiler's account of a step on one device, in bytes."""

    arguments: int
    """What lives between steps, and the step's tokens."""
    temporaries: int
    recomputed: int
    """Instructions that the compiler repeats, beyond what `compute.remat` says, to stay within the device's memory."""
    overlapped: dict[str, float]
    """By kind of collective, the share of its bytes that may travel while the device computes."""
    jax: str = jax.__version__

    @property
    def total(self) -> int:
        return self.arguments + self.temporaries


def compile_for(config: Config, cluster: Cluster) -> Compiled:
    """The step of `config` compiled for a cluster of NVIDIA GPUs, as one of them runs it.

    Raises:
        ConfigError: JAX's plugin for CUDA is not installed or cannot compile the step, or the device is not NVIDIA's.
    """
    require(
        cluster.device.kind in CHIPS,
        f"--compile is for NVIDIA GPUs ({', '.join(CHIPS)}), not for {cluster.device.kind}",
    )
    require(
        any(_installed(plugin) for plugin in PLUGINS),
        "--compile needs XLA's compiler for NVIDIA GPUs, though no GPU: pip install -e '.[cuda13]'",
    )
    compute, device = config.compute, cluster.device
    # "auto" would be resolved for the device that is here.
    attention = resolve(compute.attention, config.model.dtype, compute.deterministic, "nvidia")
    config = dataclasses.replace(config, compute=dataclasses.replace(compute, attention=attention))
    topology = {"topology": f"1x{cluster.hosts}x{cluster.per_host}", "target_config": describe_chip(device)}
    try:
        devices = topologies.get_topology_desc("", "cuda", **topology).devices
        compiled = lower_step(config, make_mesh(config, devices), "cuda").compile({"xla_gpu_autotune_level": "0"})
    except (NotImplementedError, jax.errors.JaxRuntimeError) as error:
        reason = str(error).strip().splitlines()[0][:300]
        raise ConfigError(f"XLA cannot compile the step for a {device.kind} here: {reason}") from None
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and text is not None  # XLA for GPUs has both
    return Compiled(
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes,
        len(re.findall(r"^ *(?:ROOT )?%\S+\.remat[\d.]* = ", text, re.MULTILINE)),
        overlapped(text),
    )


def lower_step(config: Config, mesh: Mesh, platform: str | None = None) -> Lowered:
    """The step for a mesh of real or described devices, ready to compile; allocates nothing."""
    state = jax.eval_shape(lambda: init_state(config))
    state = jax.tree.map(_placed, state, shardings(state, mesh))
    train = config.train
    rows = jax.ShapeDtypeStruct((train.batch_size, train.sequence_length), np.int32)
    tokens = _placed(rows, NamedSharding(mesh, BATCH))
    depths = _placed(jax.ShapeDtypeStruct((train.micro_batches,), np.int32), NamedSharding(mesh, REPLICATED))
    step = jit_train_step(config, mesh)
    traced = step.trace(state, tokens, tokens, depths, depths)
    return traced.lower(lowering_platforms=(platform,) if platform else None)


def overlapped(text: str) -> dict[str, float]:
    """By kind of collective in a compiled program's text, the share of its result bytes whose start and end are
    separate instructions with another between them; every branch counts."""
    total: dict[str, int] = defaultdict(int)
    alone: dict[str, int] = defaultdict(int)
    previous = ""
    for line in text.splitlines():
        found = re.match(r"^ *(?:ROOT )?%\S+ = (.+?) (all-gather|reduce-scatter|all-reduce|all-to-all)(-done)?\(", line)
        if found:
            result, kind, done = found.groups()
            total[kind] += _bytes(result)
            alone[kind] += 0 if done and f"{kind}-start(" not in previous else _bytes(result)
        previous = line
    return {kind: 1 - alone[kind] / size for kind, size in total.items() if size > LEAST}


def describe_chip(device: Device) -> str:
    """XLA's description of a GPU, in protobuf's text format."""
    cores, shared, shared_block, l2, clock, fp32, capability = CHIPS[device.kind]
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  shared_memory_per_block: 49152  shared_memory_per_core: {shared}  shared_memory_per_block_optin: {shared_block}
  core_count: {cores}  fpus_per_core: {fp32}  clock_rate_ghz: {clock}  l2_cache_size: {l2}
  memory_bandwidth: {int(device.memory_gbs * 1e9)}  device_memory_size: {int(device.memory_gb * 1e9 / XLA_SHARE)}
  cuda_compute_capability {{ major: {capability} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9  minor: 10 }}
runtime_version {{ major: 13 }}
device_description_str: "NVIDIA {device.kind}"
"""


def _bytes(result: str) -> int:
    """Bytes of the arrays in a type such as (bf16[8,4]{1,0}, f32[])."""
    arrays = re.findall(r"(pred|[a-z]+\d+)\[([\d,]*)\]", result)
    return sum(int(np.prod([int(axis) for axis in axes.split(",") if axis])) * _width(kind) for kind, axes in arrays)


def _width(kind: str) -> int:
    return 1 if kind == "pred" else max(1, int(re.sub(r"\D", "", kind)) // 8)


def _installed(plugin: str) -> bool:
    try:
        return find_spec(plugin) is not None
    except ModuleNotFoundError:  # its parent's
        return False


def _placed(leaf: Any, where: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
