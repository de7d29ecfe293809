"""The cost of one step on a mesh, and the meshes on which it costs least."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from jax_huginn.config.checks import ConfigError, require
from jax_huginn.config.schema import Config
from jax_huginn.cost.devices import Device
from jax_huginn.cost.memory import Memory, device_memory
from jax_huginn.cost.seconds import step_work
from jax_huginn.cost.shapes import Shapes, Sizes, state_shapes
from jax_huginn.cost.traffic import Exchange, step_traffic
from jax_huginn.model.flops import training_flops
from jax_huginn.ops.attention import resolve
from jax_huginn.parallel.mesh import AXES, mesh_sizes, require_fit
from jax_huginn.training.depth import sample_depth

DRAWS = 10_000  # of the sampler, for the mean depth; its standard error is 0.18 recurrences


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
    """n and k, the mean recurrences without and with gradient."""
    parameters: int
    memory: Memory
    traffic: list[Exchange]
    compute_seconds: dict[str, float]

    @property
    def exchange_seconds(self) -> float:
        return sum(
            exchange.seconds(self.sizes, self.cluster.device, self.cluster.per_host) for exchange in self.traffic
        )

    @property
    def seconds(self) -> float:
        """Of a step whose exchanges overlap with nothing."""
        return self.hidden_seconds + self.exchange_seconds

    @property
    def hidden_seconds(self) -> float:
        """Of a step whose exchanges are hidden behind computation altogether."""
        return sum(self.compute_seconds.values())

    @property
    def tokens(self) -> int:
        """Of one step on all devices."""
        return self.config.train.batch_size * self.config.train.sequence_length

    @property
    def flops(self) -> float:
        """Of one step on all devices, recomputation not counted."""
        return self.tokens * training_flops(self.config, *self.depth)

    def mfu(self, seconds: float) -> float:
        return self.flops / seconds / (self.cluster.devices * self.cluster.device.peak)

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.cluster.device.memory_gb * 1e9

    def name(self) -> str:
        axes = " x ".join(f"{name} {size}" for name, size in zip(AXES, self.sizes, strict=True))
        return f"{axes}, micro_batches {self.config.train.micro_batches}"


def mean_depth(config: Config) -> tuple[float, float]:
    """Mean n and k of the sampler, its curriculum past."""
    recurrence = dataclasses.replace(config.recurrence, curriculum=0)
    draws = 1 if recurrence.scheme == "fixed" else DRAWS
    n, k = np.mean([sample_depth(recurrence, config.train.seed, index) for index in range(draws)], axis=0)
    return float(n), float(k)


def plan_mesh(config: Config, cluster: Cluster, depth: tuple[float, float]) -> Plan:
    """The plan of the mesh that `config.parallel` asks for.

    Raises:
        ConfigError: the mesh cannot be, or the step does not fit into a device.
    """
    sizes = mesh_sizes(config, cluster.devices)
    require_fit(config, sizes)
    plan = _plan(config, cluster, sizes, depth, state_shapes(config))
    require(plan.fits, _too_large(plan))
    return plan


def best_meshes(config: Config, cluster: Cluster, depth: tuple[float, float], any_micro_batches: bool) -> list[Plan]:
    """All meshes that can be and fit, the shortest step first; with the config's micro-batches or `any` number.

    Raises:
        ConfigError: there is none.
    """
    shapes = state_shapes(config)
    plans, refused = [], None
    for candidate, sizes in _candidates(config, cluster.devices, any_micro_batches):
        try:
            require_fit(candidate, sizes)
        except ConfigError as error:
            refused = refused or error
            continue
        plans.append(_plan(candidate, cluster, sizes, depth, shapes))
    if not plans:
        raise refused or ConfigError(f"no mesh of {cluster.devices} devices can be")
    fitting = [plan for plan in plans if plan.fits]
    if not fitting:
        raise ConfigError(_too_large(min(plans, key=lambda plan: plan.memory.total)) + ", and no other mesh needs less")
    return sorted(fitting, key=lambda plan: (round(plan.seconds, 4), plan.memory.total))


def _candidates(config: Config, devices: int, any_micro_batches: bool) -> Iterator[tuple[Config, Sizes]]:
    train = config.train
    counts = [train.micro_batches]
    if any_micro_batches and train.batch_size % devices == 0:
        at_once = train.batch_size // devices  # sequences of a step on a device
        counts = [count for count in range(1, at_once + 1) if at_once % count == 0]
    for expert in _divisors(devices):
        for fsdp in _divisors(devices // expert):
            sizes = (devices // expert // fsdp, fsdp, expert)
            parallel = dataclasses.replace(config.parallel, **dict(zip(AXES, sizes, strict=True)))
            for count in counts:
                replaced = dataclasses.replace(train, micro_batches=count)
                yield dataclasses.replace(config, parallel=parallel, train=replaced), sizes


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _plan(config: Config, cluster: Cluster, sizes: Sizes, depth: tuple[float, float], shapes: Shapes) -> Plan:
    model = config.model
    fused = resolve(config.compute.attention, model.dtype, config.compute.deterministic, "nvidia") == "cudnn"
    return Plan(
        config=config,
        cluster=cluster,
        sizes=sizes,
        depth=depth,
        parameters=shapes.parameters,
        memory=device_memory(config, sizes, shapes, fused),
        traffic=step_traffic(config, sizes, shapes, depth[0]),
        compute_seconds=step_work(config, sizes, shapes, *depth).seconds(cluster.device),
    )


def _too_large(plan: Plan) -> str:
    memory = plan.memory
    kind, size = max((memory.kept | memory.temporary).items(), key=lambda item: item[1])
    return (
        f"{plan.name()} needs {memory.total / 1e9:.1f} GB on each device, of it {size / 1e9:.1f} GB {kind}; "
        f"a {plan.cluster.device.kind} has {plan.cluster.device.memory_gb:g} GB for it"
    )
