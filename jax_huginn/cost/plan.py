"""The cost of a training step on a mesh, and the cheapest ways to run it."""

import dataclasses
import itertools
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np

from jax_huginn.config.checks import ConfigError
from jax_huginn.config.schema import Config
from jax_huginn.cost.devices import Device
from jax_huginn.cost.memory import Memory, Sizes, State, device_memory, state_arrays
from jax_huginn.cost.roofline import Exchange, step_exchanges, step_work
from jax_huginn.model.flops import training_flops
from jax_huginn.ops.attention import resolve
from jax_huginn.parallel.mesh import AXES, mesh_sizes, require_fit
from jax_huginn.training.depth import sample_depth

DRAWS = 10_000  # of the sampler, for the mean depth, whose standard error is then 0.18 recurrences
SEARCHED = ("mesh", "micro_batches", "remat")
POLICIES = ("dots", "dots_except_gate_up", "attention", "full")  # of `compute.remat`; `none` was never tried on a GPU


@dataclass(frozen=True)
class Cluster:
    """The devices of a run."""

    device: Device
    hosts: int
    per_host: int

    @property
    def devices(self) -> int:
        return self.hosts * self.per_host


@dataclass(frozen=True)
class Plan:
    """One step of a config on a mesh."""

    config: Config
    cluster: Cluster
    sizes: Sizes
    depth: tuple[float, float]
    """n and k: mean recurrences without and with gradient."""
    parameters: int
    memory: Memory
    exchanges: list[Exchange]
    compute_seconds: dict[str, float]

    @property
    def exchange_seconds(self) -> float:
        return sum(each.seconds(self.sizes, self.cluster.device, self.cluster.per_host) for each in self.exchanges)

    @property
    def hidden_seconds(self) -> float:
        """A step whose exchanges all overlap with computation."""
        return sum(self.compute_seconds.values())

    @property
    def seconds(self) -> float:
        """A step whose exchanges overlap with nothing."""
        return self.hidden_seconds + self.exchange_seconds

    @property
    def tokens(self) -> int:
        """Tokens of a step on all devices."""
        return self.config.train.batch_size * self.config.train.sequence_length

    @property
    def sequences_at_once(self) -> int:
        """Sequences of a micro-batch on one device."""
        return self.config.train.batch_size // self.config.train.micro_batches // self.cluster.devices

    @property
    def flops(self) -> float:
        """FLOPs of a step on all devices, recomputation not counted."""
        return self.tokens * training_flops(self.config, *self.depth)

    def mfu(self, seconds: float) -> float:
        return self.flops / seconds / (self.cluster.devices * self.cluster.device.peak)

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.cluster.device.memory_gb * 1e9

    @property
    def name(self) -> str:
        axes = " x ".join(f"{name} {size}" for name, size in zip(AXES, self.sizes, strict=True))
        return f"{axes}, micro_batches {self.config.train.micro_batches}, remat {self.config.compute.remat}"


def mean_depth(config: Config) -> tuple[float, float]:
    """Mean n and k of the sampler after its curriculum."""
    recurrence = dataclasses.replace(config.recurrence, curriculum=0)
    draws = 1 if recurrence.scheme == "fixed" else DRAWS
    n, k = np.mean([sample_depth(recurrence, config.train.seed, index) for index in range(draws)], axis=0)
    return float(n), float(k)


def best_plans(
    config: Config, cluster: Cluster, depth: tuple[float, float], search: Collection[str] = SEARCHED
) -> list[Plan]:
    """All plans that fit, the shortest step first. What is not searched stays as in the config.

    Raises:
        ConfigError: none is possible, or none fits.
    """
    state = state_arrays(config)
    plans, refusal = [], None
    for candidate, sizes in _candidates(config, cluster.devices, search):
        try:
            require_fit(candidate, sizes)
        except ConfigError as error:
            refusal = refusal or error
            continue
        plans.append(_plan(candidate, cluster, sizes, depth, state))
    if not plans:
        raise refusal or ConfigError(f"no mesh of {cluster.devices} devices is possible")
    fitting = [plan for plan in plans if plan.fits]
    if not fitting:
        others = ", and every other choice tried needs more" if len(plans) > 1 else ""
        raise ConfigError(_too_large(min(plans, key=lambda plan: plan.memory.total)) + others)
    return sorted(fitting, key=lambda plan: (round(plan.seconds, 4), plan.memory.total))


def _candidates(config: Config, devices: int, search: Collection[str]) -> Iterator[tuple[Config, Sizes]]:
    train, compute = config.train, config.compute
    if "mesh" in search:
        splits = [(fsdp, expert) for expert in _divisors(devices) for fsdp in _divisors(devices // expert)]
        meshes = [(devices // expert // fsdp, fsdp, expert) for fsdp, expert in splits]
    else:
        meshes = [mesh_sizes(config, devices)]
    counts = [train.micro_batches]
    if "micro_batches" in search and train.batch_size % devices == 0:
        counts = _divisors(train.batch_size // devices)
    for sizes, count, remat in itertools.product(meshes, counts, POLICIES if "remat" in search else [compute.remat]):
        candidate = dataclasses.replace(
            config,
            parallel=dataclasses.replace(config.parallel, **dict(zip(AXES, sizes, strict=True))),
            train=dataclasses.replace(train, micro_batches=count),
            compute=dataclasses.replace(compute, remat=remat),
        )
        yield candidate, sizes


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _plan(config: Config, cluster: Cluster, sizes: Sizes, depth: tuple[float, float], state: State) -> Plan:
    compute = config.compute
    fused = resolve(compute.attention, config.model.dtype, compute.deterministic, "nvidia") == "cudnn"
    return Plan(
        config=config,
        cluster=cluster,
        sizes=sizes,
        depth=depth,
        parameters=state.parameters,
        memory=device_memory(config, sizes, state, fused),
        exchanges=step_exchanges(config, sizes, state, depth[0]),
        compute_seconds=step_work(config, sizes, state, *depth).seconds(cluster.device),
    )


def _too_large(plan: Plan) -> str:
    memory, device = plan.memory, plan.cluster.device
    kind, size = max(memory.kinds.items(), key=lambda item: item[1])
    return (
        f"{plan.name} needs {memory.total / 1e9:.1f} GB on each device, {size / 1e9:.1f} GB of them {kind}; "
        f"a program may fill {device.memory_gb:g} GB of {device.kind}"
    )
