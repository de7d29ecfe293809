"""The sections that say how a run is executed: `compute`, `parallel` and `profile`."""

import re
from dataclasses import dataclass
from typing import Literal

from jax_huginn.config.checks import require, require_positive


@dataclass(frozen=True)
class ComputeConfig:
    """How the same model is computed: kernels, memory and their speed. All of it may change when a run resumes."""

    attention: Literal["auto", "xla", "cudnn", "einsum"] = "auto"
    """Attention kernel. auto: cudnn for 16-bit types on NVIDIA, einsum on CPUs and for float64, xla elsewhere."""
    remat: Literal["none", "dots", "dots_except_gate_up", "attention", "full"] = "full"
    """Activations recomputed in the backward pass. none: nothing is. dots: all but matmul and attention outputs.
    dots_except_gate_up: as dots, and the MLP's gate/up matmul. attention: all but attention outputs. full: everything.
    """
    unroll: bool = False
    """Unroll the recurrences with gradient, unless remat is full. Faster, since nothing is copied into stacked buffers,
    but slower to compile."""
    fp8: bool = False
    """Experimental: matmuls of the recurrences in 8-bit floats while training (docs/performance.md). Fast on NVIDIA
    GPUs from Hopper on. Validation, evaluation and generation compute in model.dtype."""
    loss_chunk: int = 2048
    """Tokens whose logits exist at once on a device in training; the (B,S,V) logits never do."""
    deterministic: bool = False
    """Bit-reproducible kernels on a GPU: XLA's, and its attention in place of cuDNN's, which takes (B,H,S,S) scores of
    memory. Results on a CPU are always reproducible."""

    def __post_init__(self) -> None:
        require_positive("compute", self, "loss_chunk")
        require(
            not (self.deterministic and self.attention == "cudnn"),
            "compute.deterministic=true needs another kernel than compute.attention=cudnn: use auto or xla",
        )


@dataclass(frozen=True)
class ParallelConfig:
    """The device mesh (data, fsdp, expert), over all of which the batch is split, and its processes."""

    data: int = -1
    """Copies of the whole state, each split over fsdp x expert devices; -1: all remaining devices."""
    fsdp: int = 1
    """Parts into which weights, moments and gradients are split along `model.width`; -1: all remaining devices."""
    expert: int = 1
    """Parts into which the routed experts, and again every other weight, are split; -1: all remaining devices."""
    dispatch: Literal["ring", "all_to_all"] = "ring"
    """How tokens reach the devices of their experts. ring: every token to every device; dropless. all_to_all: at most
    `capacity_factor` times an even share to each expert; the rest is dropped."""
    capacity_factor: float = 1.25
    """Slots of all_to_all for each expert on each device, relative to an even split of the device's tokens."""
    coordinator: str = ""
    """host:port of process 0, given with `process_count` and `process_id`; SLURM, Open MPI and Kubernetes set it."""
    process_count: int = 0
    """Processes of the run. 0: as SLURM, Open MPI or Kubernetes set it, one without them."""
    process_id: int = 0
    """Number of this process, from 0."""
    heartbeat_seconds: int = 30
    """Seconds of silence after which a process counts as dead, which ends the others."""

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in ("data", "fsdp", "expert")}
        for name, size in sizes.items():
            require(size > 0 or size == -1, f"parallel.{name}={size} must be positive, or -1 for the rest")
        rest = [f"parallel.{name}" for name, size in sizes.items() if size == -1]
        require(len(rest) <= 1, f"{' and '.join(rest)} are both -1: only one can be the rest")
        require(
            not rest or self.dispatch != "all_to_all",
            f"parallel.dispatch=all_to_all drops by device, so the mesh belongs to the run: give {''.join(rest)} a "
            "number",
        )
        require_positive("parallel", self, "capacity_factor", "heartbeat_seconds")
        require(self.process_count >= 0, f"parallel.process_count={self.process_count} must not be negative")
        require(
            0 <= self.process_id < max(self.process_count, 1),
            f"parallel.process_id={self.process_id} must lie in [0, parallel.process_count={self.process_count})",
        )
        require(
            self.process_count < 2 or ":" in self.coordinator,
            f"parallel.process_count={self.process_count} needs --parallel.coordinator HOST:PORT of process 0",
        )


@dataclass(frozen=True)
class ProfileConfig:
    """A trace of the device and the host, for TensorBoard, XProf and Perfetto."""

    steps: str = ""
    """Steps to trace into RUN/profile, FIRST:LAST, both traced and counted from 1, for example 10:13. Empty: none."""

    @property
    def range(self) -> range:
        """The steps that are traced."""
        first, last = map(int, self.steps.split(":")) if self.steps else (1, 0)
        return range(first, last + 1)

    def __post_init__(self) -> None:
        require(
            not self.steps or (re.fullmatch(r"\d{1,9}:\d{1,9}", self.steps) is not None and len(self.range) > 0),
            f"profile.steps={self.steps} is not a range of steps: write FIRST:LAST, for example 10:13",
        )
        require(not self.steps or self.range[0] > 0, f"profile.steps={self.steps}: steps are counted from 1")
