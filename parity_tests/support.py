"""Pairs of models, one in JAX and one in Torch, that hold the same weights, and their comparison.

The weights are drawn once in NumPy and reach Torch through `jax_huginn.interop.names`, the product's own map. They are
never init weights, at which swapped norms or a missing bias change nothing. Everything that is compared carries a
name, in the order of the forward pass, so the first name of a failure is the place to look.

Shapes: B batch, S sequence, D width, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

import torch_reference
from jax_huginn.config.schema import Config
from jax_huginn.interop.model_config import model_config
from jax_huginn.interop.names import to_torch
from jax_huginn.model import moe
from jax_huginn.model.huginn import HuginnOutput, MoEHuginnModel, TrainingLoss, abstract_model
from tests.support import small_config
from torch_reference.model import MoEHuginnOutput
from torch_reference.moe import RoutingStatistics

torch.set_num_threads(1)  # tensors this small lose tenfold to threads that wait for each other on a busy machine

KINDS: dict[str, dict[str, dict[str, Any]]] = {
    "dense": {"moe": {"experts": 0}},
    "grouped": {"moe": {"experts": 0}, "model": {"kv_heads": 2}, "compute": {"remat": "full"}},
    "injection": {},
    "residual": {"moe": {"residual": True}},
    "core": {"moe": {"placement": "core"}},
}
DEPTHS = ((0, 1), (3, 2), (5, 4))  # (n, k); the backpropagation depth of `small_config` is 4
# Tolerances: relative L2 error per tensor.
VALUES = {"float64": 1e-10, "float32": 1e-5}
GRADIENTS = {"float64": 1e-9, "float32": 1e-4}
LOSS_CURVE = {"float64": 1e-8, "float32": 1e-4}


def _known(options: dict[str, Any]) -> dict[str, Any]:
    """The options that this version of XLA has."""

    def is_known(name: str) -> bool:
        try:
            jax.jit(lambda: 0, compiler_options={name: options[name]}).lower().compile()
        except jax.errors.JaxRuntimeError:
            return False
        return True

    return {name: value for name, value in options.items() if is_known(name)}


# The same program after XLA's own passes, but by a plain generator of machine code that LLVM does not polish: a quarter
# of the time to compile. One test uses the compiler as it comes.
COMPILER_OPTIONS = _known({"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False})
# XLA's defaults, which conftest.py changes for the whole process.
XLAS_OWN_OPTIONS = _known({
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
    "xla_cpu_use_fusion_emitters": True,
})  # fmt: skip

Tensors = dict[str, np.ndarray]


def jit(function: Callable) -> Callable:
    return jax.jit(function, compiler_options=COMPILER_OPTIONS)


# ---- Models -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Batch:
    tokens: np.ndarray  # (B, S)
    labels: np.ndarray  # (B, S), some of them ignored
    state: np.ndarray  # s_0, (B, S, D)


@dataclasses.dataclass(frozen=True)
class Pair:
    """The same model twice. `twin` is shared by tests: copy it before changing it."""

    config: Config
    graphdef: Any
    params: Any
    twin: torch_reference.MoEHuginnModel

    @property
    def dtype(self) -> str:
        return self.config.model.dtype

    def model(self, params: Any = None) -> MoEHuginnModel:
        return nnx.merge(self.graphdef, self.params if params is None else params)

    def forward(self, k: int) -> Callable[..., HuginnOutput]:
        """(tokens, labels, n, s_0) -> output by the explicit `num_steps=(n, k)`; compiled once for all n."""
        return functools.partial(_forward(self, k), self.params)

    def training(self) -> Callable[..., tuple[TrainingLoss, Any]]:
        """(tokens, labels, n, k, s_0) -> output, gradients of `training_loss`; compiled once for all n and k."""
        return functools.partial(_training(self), self.params)

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


@functools.cache
def _forward(pair: Pair, k: int) -> Callable:
    return jit(lambda params, tokens, labels, n, state: pair.model(params)(tokens, (n, k), state, labels))


@functools.cache
def _training(pair: Pair) -> Callable:
    return jit(with_gradients(lambda params, *inputs: pair.model(params).training_loss(*inputs)))


def with_gradients(function: Callable[..., Any]) -> Callable[..., tuple[Any, Any]]:
    """(params, ...) -> output and the gradients of its loss with respect to `params`."""

    def loss(params: Any, *inputs: Any) -> tuple[jax.Array, Any]:
        output = function(params, *inputs)
        assert output.loss is not None
        return output.loss, output

    def run(params: Any, *inputs: Any) -> tuple[Any, Any]:
        (_, output), gradients = jax.value_and_grad(loss, has_aux=True)(params, *inputs)
        return output, gradients

    return run


def make_pair(kind: str, dtype: str = "float64") -> Pair:
    """The pair of a kind, made once for all tests."""
    return _make_pair(kind, dtype)  # one spelling of the arguments, for the cache


@functools.cache
def _make_pair(kind: str, dtype: str) -> Pair:
    sections = {name: dict(fields) for name, fields in KINDS[kind].items()}
    param_dtype = "float64" if dtype == "float64" else "float32"
    sections.setdefault("model", {}).update(dtype=dtype, param_dtype=param_dtype)
    return pair_of(small_config(**sections))


def pair_of(config: Config, seed: int = 0, bfloat16_weights: bool = False) -> Pair:
    """Both models of a config with parity weights, the Torch one in the config's compute type."""
    graphdef, abstract = abstract_model(config)
    params = parity_weights(config, abstract, seed)
    if bfloat16_weights:
        params = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(x.dtype), params)
    twin = torch_reference.MoEHuginnModel(twin_config(config), seed=None)
    twin = twin.to(torch.float64 if config.model.param_dtype == "float64" else torch.float32)
    load(twin, params)
    return Pair(config, graphdef, params, twin.to(getattr(torch, config.model.dtype)))


def twin_config(config: Config) -> torch_reference.MoEHuginnConfig:
    """The Torch config by way of the exported `model_config`."""
    return torch_reference.MoEHuginnConfig.from_model_config(model_config(config))


def load(twin: torch.nn.Module, params: Any) -> None:
    twin.load_state_dict({name: torch.from_numpy(np.array(value, order="C")) for name, value in to_torch(params)})


def parity_weights(config: Config, abstract: Any, seed: int = 0) -> Any:
    """Norms 1 + 0.3 N, qk_bias 0.5 N, output projections five and the router ten times the size of their init."""
    generator = np.random.default_rng(seed)
    model = config.model
    std = np.sqrt(2 / (5 * model.width))
    depth = model.prelude_layers + model.core_layers * config.recurrence.mean + model.coda_layers

    def draw(path: Any, leaf: Any) -> jax.Array:
        name = path[-1].key
        noise = generator.standard_normal(leaf.shape)
        if name == "weight":
            value = 1 + 0.3 * noise
        elif name == "qk_bias":
            value = 0.5 * noise
        elif name in ("w_out", "w_proj", "w_down"):
            value = 5 * std / np.sqrt(2 * depth) * noise
        elif name == "router":
            value = 10 * 0.02 * noise
        else:
            value = std * noise
        return jnp.asarray(value, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, abstract)


def make_batch(config: Config, rows: int = 2, length: int = 64, seed: int = 1) -> Batch:
    generator = np.random.default_rng(seed)
    tokens, labels = generator.integers(0, config.model.vocab_size, (2, rows, length))
    labels[:, ::7] = -100
    state = np.sqrt(0.4) * generator.standard_normal((rows, length, config.model.width))
    return Batch(tokens, labels, state.astype(np.float32))  # a state that every type can hold


# ---- Runs -------------------------------------------------------------------------------------------------------


def run_jax(pair: Pair, batch: Batch, n: int, k: int) -> Tensors:
    """Everything that training computes, gradients of every parameter included, and the explicit path's values.

    These depend on n + k alone (except the routing of a core MoE), so one compilation, k = 1, serves all depths.
    """
    state = jnp.asarray(batch.state, pair.dtype)
    output, gradients = pair.training()(batch.tokens, batch.labels, np.int32(n), np.int32(k), state)
    explicit = pair.forward(1)(batch.tokens, batch.labels, np.int32(n + k - 1), state)
    return {
        **values_of(output, "training "),
        **values_of(explicit, "explicit "),
        **jax_gradients(gradients),
    }


def run_torch(twin: torch_reference.MoEHuginnModel, batch: Batch, n: int, k: int) -> Tensors:
    """The same names as `run_jax`."""
    output, gradients = torch_step(twin, batch, n, k)
    training = values_of(output, "training ")
    del training["training logits"], training["training latents"]
    return {**training, **values_of(torch_forward(twin, batch, n + k - 1, 1), "explicit "), **gradients}


@torch.no_grad()
def torch_forward(twin: torch_reference.MoEHuginnModel, batch: Batch, n: int, k: int) -> MoEHuginnOutput:
    tokens, labels, state = (torch.from_numpy(x).to(twin.device) for x in (batch.tokens, batch.labels, batch.state))
    return twin(tokens, (n, k), state, labels)


def torch_step(twin: torch_reference.MoEHuginnModel, batch: Batch, n: int, k: int) -> tuple[MoEHuginnOutput, Tensors]:
    twin.zero_grad()
    tokens, labels, state = (torch.from_numpy(x).to(twin.device) for x in (batch.tokens, batch.labels, batch.state))
    output = twin(tokens, (n, k), state, labels)
    assert output.loss is not None
    output.loss.backward()
    gradients = {name: array_of(weight.grad) for name, weight in twin.named_parameters() if weight.grad is not None}
    return output, in_forward_order(gradients)


def jax_gradients(gradients: Any) -> Tensors:
    return in_forward_order({name: np.asarray(value) for name, value in to_torch(gradients)})


def values_of(output: HuginnOutput | TrainingLoss | MoEHuginnOutput, prefix: str = "") -> Tensors:
    """The forward pass's results by name, in its order; integers are compared exactly."""
    values: dict[str, Any] = {}
    if output.moe is not None:
        values |= {f"moe.{name}": value for name, value in routing_values(output.moe).items()}
    if isinstance(output, (HuginnOutput, TrainingLoss)):
        residual, relative = output.recurrence["recurrent_residual"], output.recurrence["rel_residual"]
    else:
        residual, relative = output.recurrent_residual, output.recurrent_residual / output.state_norm
    values |= {"recurrent_residual": residual, "rel_residual": relative}
    if not isinstance(output, TrainingLoss):
        values |= {"latents": output.latents, "logits": output.logits}
    values |= {"log_ppl": output.log_ppl, "loss": output.loss}
    return {prefix + name: array_of(value) for name, value in values.items() if value is not None}


def routing_values(routing: moe.Routing | RoutingStatistics) -> dict[str, np.ndarray]:
    counts = {name: array_of(getattr(routing, name)).astype(np.int64) for name in ("counts_QE", "first_choice_E")}
    names = ("probability_QE", "entropy", "balance_loss", "z_loss")
    return counts | {name: array_of(getattr(routing, name)) for name in names}


def array_of(x: Any) -> np.ndarray:
    """NumPy, in float64 where NumPy does not know the type."""
    if isinstance(x, torch.Tensor):
        x = x.detach().cpu()
        return x.double().numpy() if x.dtype == torch.bfloat16 else x.numpy()
    return np.asarray(x.astype(jnp.float64) if x.dtype == jnp.bfloat16 else x)


def in_forward_order(tensors: Tensors) -> Tensors:
    parts = ("wte", "prelude", "moe", "moe_norm", "adapter", "core_block", "coda", "ln_f")
    return dict(sorted(tensors.items(), key=lambda item: parts.index(item[0].split(".")[1])))


# ---- Comparison -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Difference:
    name: str
    error: float
    tolerance: float

    def __str__(self) -> str:
        return f"{self.name}: off by {self.error:.2e}, tolerance {self.tolerance:.0e}"


LARGEST: dict[str, tuple[float, str]] = {}
"""The largest error seen in each row of the table of tolerances, and where; printed at the end of a run."""


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Relative L2; for integers 0 where all agree, else infinity."""
    if ours.shape != theirs.shape:
        return float("inf")
    if np.issubdtype(theirs.dtype, np.integer):
        return 0.0 if np.array_equal(ours, theirs) else float("inf")
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    error, size = np.linalg.norm(ours - theirs), np.linalg.norm(theirs)
    if size == 0:
        return 0.0 if error == 0 else float("inf")
    return float(error / size)


def compare(ours: Tensors, theirs: Tensors, tolerance: float, row: str = "") -> list[Difference]:
    """Every tensor that left the tolerance, in the order of the forward pass. A NaN has left it."""
    assert ours.keys() == theirs.keys(), f"only on one side: {sorted(ours.keys() ^ theirs.keys())}"
    differences = []
    for name in ours:
        error = relative_error(ours[name], theirs[name])
        if row and error > LARGEST.get(row, (-1.0, ""))[0]:
            LARGEST[row] = (error, name)
        if not error <= tolerance:
            differences.append(Difference(name, error, tolerance))
    return differences


def check(ours: Tensors, theirs: Tensors, tolerance: float, row: str = "", explain: Callable[[], str] = str) -> None:
    """Fail with all that differs, the first in the forward pass first; `explain` may add what it costs to find."""
    differences = compare(ours, theirs, tolerance, row)
    if differences:
        listed = "\n  ".join(map(str, differences))
        message = f"{len(differences)} of {len(ours)} tensors differ between JAX and Torch, in forward order:"
        raise AssertionError(f"{message}\n  {listed}\n{explain()}")


def split(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """Values and gradients."""
    parts = ({}, {})
    for name, value in tensors.items():
        parts[name.startswith("transformer.")][name] = value
    return parts


def differences_of_run(ours: Tensors, theirs: Tensors, dtype: str) -> list[Difference]:
    """What `check_run` would complain about."""
    (our_values, our_gradients), (their_values, their_gradients) = split(ours), split(theirs)
    return compare(our_values, their_values, VALUES[dtype]) + compare(our_gradients, their_gradients, GRADIENTS[dtype])
