"""The section `parallel`: how a run is spread over devices and processes."""

from dataclasses import dataclass
from typing import Literal

from jax_huginn.config.checks import require, require_positive


@dataclass(frozen=True)
class ParallelConfig:
    """Devices as a mesh (data, fsdp, expert), over all of which the batch is split, and the processes that own them."""

    data: int = -1
    """Copies of the whole state, each split over fsdp x expert devices; -1 is what the other two leave."""
    fsdp: int = 1
    """Parts into which weights, moments and gradients are split along `model.width`; -1 is what the others leave."""
    expert: int = 1
    """Parts into which the routed experts are split, and every other weight once more; -1 is what the others leave."""
    dispatch: Literal["ring", "all_to_all", "ragged"] = "ring"
    """How tokens reach their experts' device. ring: all go everywhere, dropless. all_to_all: at most `capacity_factor`
    times an even share each, the rest is dropped. ragged: only where needed, dropless; GPUs only."""
    capacity_factor: float = 1.25
    """Places that all_to_all keeps for each expert on each device, relative to an even split of its tokens."""
    coordinator: str = ""
    """host:port of process 0, given with `process_count` and `process_id`; needless under the launchers named below."""
    process_count: int = 0
    """Processes of the run. 0: what SLURM, Open MPI or Kubernetes say, and one without them."""
    process_id: int = 0
    """Number of this process, from 0."""
    heartbeat_seconds: int = 30
    """A process that has been silent for so long counts as dead, which ends the others."""

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
