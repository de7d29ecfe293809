"""What parity_report.py measures where there is a GPU: float32 without TF32, and bfloat16 with the fast attention.

The models are those of parity_tests but wider, with heads of 64, which cuDNN's attention takes. The float64 results
are Torch's on the CPU. The other Torch runs are on the GPU where Torch has one, else on the CPU.

Shapes: T tokens, A experts a token.
"""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import torch
from parity_table import BOUND, Claim, beside
from torch.nn.attention import SDPBackend, sdpa_kernel

from jax_huginn.config.schema import Config
from jax_huginn.ops.attention import resolve
from parity_tests import support
from parity_tests.layers import RouterSpy, jax_router_choosing
from parity_tests.support import Batch, Pair, Tensors, relative_error
from tests.support import small_config
from torch_reference import MoEHuginnModel

N, K = 5, 4  # recurrences without and with gradient: the deepest at which float32 is held to a fixed tolerance
FLOAT32 = "float32, TF32 off: JAX against Torch"
BFLOAT16 = "bfloat16, {attention} attention in JAX: each framework against float64"


def measure() -> tuple[list[Claim], str]:
    """The claims, and the name of the device that Torch ran on."""
    support.COMPILER_OPTIONS.clear()  # what the CPU tests save compilation by is not how a GPU is used
    jax.config.update("jax_default_matmul_precision", "highest")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    attention = resolve("auto", "bfloat16") if jax.default_backend() == "gpu" else "xla"  # a dry run on the CPU
    claims: list[Claim] = []
    start = time.perf_counter()

    def say() -> None:  # a run that is stopped keeps what it has
        print(f"{time.perf_counter() - start:.0f} s  {claims[-1]}", file=sys.stderr, flush=True)

    for kind in ("dense", "injection", "core"):
        claims.append(Claim(f"{kind}: values and every gradient agree, n+k={N + K}", FLOAT32))
        float32_agrees(claims[-1], kind, device)
        say()
    for kind in ("dense", "injection", "core"):
        text = f"{kind}: JAX and Torch are as near to float64, n+k={N + K}"
        text += "" if kind == "dense" else ", expert choice fixed"
        claims.append(Claim(text, BFLOAT16.format(attention=attention)))
        bfloat16_is_as_near_as_torch(claims[-1], kind, device, attention)
        say()
    return claims, torch.cuda.get_device_name() if device.type == "cuda" else "the CPU"


def float32_agrees(claim: Claim, kind: str, device: torch.device) -> None:
    """Every tensor within tolerance; for the MoE at the injection the training path of traced depth too."""
    pair, batch = pair_on(device, gpu_config(kind, "float32")), batch_of(kind)
    with exact_attention(device):
        theirs = run_twin(pair.twin, batch)
    ours = run_explicit(pair, batch)
    if kind == "injection":
        state = jnp.asarray(batch.state, pair.dtype)
        output, gradients = pair.training()(batch.tokens, batch.labels, np.int32(N), np.int32(K), state)
        trained = support.values_of(output, "training ") | {
            f"training {name}": value for name, value in support.jax_gradients(gradients).items()
        }
        ours |= trained
        theirs |= {name: theirs[name.removeprefix("training ")] for name in trained}
    parts = {
        "logits": support.VALUES,
        "latents": support.VALUES,
        "other values": support.VALUES,
        "gradients": support.GRADIENTS,
    }
    claim.cases = 1
    for part, tolerances in parts.items():
        names = [name for name in ours if part_of(name) == part]
        errors = {name: relative_error(ours[name], theirs[name]) for name in names}
        worst = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else np.inf)
        claim.errors[f"{part} ({worst} of {len(names)})" if len(names) > 1 else part] = (
            f"{errors[worst]:.1e}",
            f"{tolerances['float32']:.0e}",
        )
        claim.failures |= int(not errors[worst] <= tolerances["float32"])


def part_of(name: str) -> str:
    name = name.removeprefix("training ")
    return name if name in ("logits", "latents") else "gradients" if name.startswith("transformer.") else "other values"


def bfloat16_is_as_near_as_torch(claim: Claim, kind: str, device: torch.device, attention: str) -> None:
    """Latents, logits and all gradients as one vector; in all three runs token t visits experts t and t + 1."""
    pair = pair_on(device, gpu_config(kind, "bfloat16", attention))
    exact = exact_twin(kind, pair)
    batch = batch_of(kind)
    token_T = np.arange(batch.tokens.size)
    choice_TA = np.stack([token_T % 4, (token_T + 1) % 4], axis=1)
    with jax_router_choosing(choice_TA) if kind != "dense" else contextlib.nullcontext():
        ours = run_explicit(pair, batch)
    theirs, reference = (run_twin(twin, batch, None if kind == "dense" else choice_TA) for twin in (pair.twin, exact))
    claim.cases = 1
    for part in ("latents", "logits", "gradients"):
        a, b = (relative_error(part_as_vector(run, part), part_as_vector(reference, part)) for run in (ours, theirs))
        claim.errors[part] = (beside(a, b), BOUND)
        claim.failures |= int(not (a <= 1.5 * b + 1e-6 and b <= 1.5 * a + 1e-6))


def part_as_vector(run: Tensors, part: str) -> np.ndarray:
    return np.concatenate([run[name].astype(np.float64).ravel() for name in sorted(run) if part_of(name) == part])


# ---- Models and runs ----------------------------------------------------------------------------------------------


def gpu_config(kind: str, dtype: str, attention: str = "auto") -> Config:
    sections = {name: dict(fields) for name, fields in support.KINDS[kind].items()}
    sections["model"] = sections.get("model", {}) | {
        "width": 256,
        "heads": 4,
        "kv_heads": 4,
        "mlp_width": 512,
        "vocab_size": 512,
        "dtype": dtype,
        "param_dtype": "float64" if dtype == "float64" else "float32",
    }
    sections["compute"] = sections.get("compute", {}) | {"loss_chunk": 256, "attention": attention}
    sections["moe"] = sections.get("moe", {}) | {"width": 128}
    return small_config(**sections)


def batch_of(kind: str) -> Batch:
    """512 tokens, and an initial state that bfloat16 holds exactly."""
    batch = support.make_batch(gpu_config(kind, "float32"), rows=4, length=128)
    return dataclasses.replace(batch, state=np.asarray(jnp.asarray(batch.state, jnp.bfloat16), np.float32))


def pair_on(device: torch.device, config: Config) -> Pair:
    pair = support.pair_of(config, bfloat16_weights=config.model.dtype == "bfloat16")
    pair.twin.to(device)
    return pair


def exact_twin(kind: str, pair: Pair) -> MoEHuginnModel:
    """The same weights in float64 on the CPU."""
    twin = support.pair_of(gpu_config(kind, "float64")).twin
    twin.load_state_dict({name: weight.double().cpu() for name, weight in pair.twin.state_dict().items()})
    return twin


def run_explicit(pair: Pair, batch: Batch) -> Tensors:
    """Values and gradients of `model(tokens, num_steps=(N, K), labels=...)`."""
    state = jnp.asarray(batch.state, pair.dtype)

    def run(params, n):
        return pair.model(params)(jnp.asarray(batch.tokens), (n, K), state, jnp.asarray(batch.labels))

    output, gradients = support.jit(support.with_gradients(run))(pair.params, np.int32(N))
    return support.values_of(output) | support.jax_gradients(gradients)


def run_twin(twin: MoEHuginnModel, batch: Batch, choice_TA: np.ndarray | None = None) -> Tensors:
    """The same in Torch, on the model's device."""
    spy = RouterSpy(choice_TA)
    spy.fixed = None if spy.fixed is None else spy.fixed.to(twin.device)
    with spy:
        output, gradients = support.torch_step(twin, batch, N, K)
    return support.values_of(output) | gradients


@contextlib.contextmanager
def exact_attention(device: torch.device) -> Iterator[None]:
    """Torch's plain attention on a GPU: of the fused kernels in float32 some round as TF32 does."""
    with sdpa_kernel(SDPBackend.MATH) if device.type == "cuda" else contextlib.nullcontext():
        yield
