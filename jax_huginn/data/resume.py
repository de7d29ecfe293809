"""The exact position in the data, saved whole and restored in parts.

Each process tracks its own streams; a checkpoint stores them merged, so a run can resume with a different process
count. The whole is JSON: `order` (everything that fixes the order of the rows), `rows` (returned by all processes
together), `streams` and `skipped` (six and four integers for each of the V virtual streams). A process's part has the
same fields for its own streams, and `process` = [p, P].
"""

from collections.abc import Sequence
from typing import Any

from jax_huginn.data.sources.files import DataError

Position = dict[str, Any]
BY_STREAM = ("streams", "skipped")


def whole_position(parts: Sequence[Position]) -> Position:
    """Merge the parts of all P processes, in any order, taken after the same number of batches."""
    ordered = sorted(parts, key=lambda part: part["process"])
    if [part["process"] for part in ordered] != [[process, len(parts)] for process in range(len(parts))]:
        raise DataError(f"{len(parts)} parts of a position come from processes {[part['process'] for part in parts]}")
    for name in ("order", "rows"):
        if any(part[name] != ordered[0][name] for part in ordered):
            raise DataError(f"parts of a position differ in {name}: {[part[name] for part in ordered]}")
    whole = {"order": ordered[0]["order"], "rows": ordered[0]["rows"]}
    for name in BY_STREAM:
        count = sum(len(part[name]) for part in ordered)
        whole[name] = [ordered[index % len(parts)][name][index // len(parts)] for index in range(count)]
    return whole


def require_same_order(then: dict[str, Any], now: dict[str, Any]) -> None:
    """
    Raises:
        DataError: a position with the order `then` means other rows under the order `now`.
    """
    for name in sorted(then.keys() | now.keys()):
        if then.get(name) != now.get(name):
            raise DataError(
                f"the checkpoint's data order has {name}={then.get(name)}, this run {name}={now.get(name)}: restore "
                "the old value, or start a new run with --checkpoint.init_from"
            )


def local_part(position: Position, process: int, processes: int) -> Position:
    """The part of process `process` of `processes` in a whole position; its own part is returned unchanged."""
    if "process" in position:
        if position["process"] != [process, processes]:
            raise DataError(f"the position of process {position['process']} was given to {[process, processes]}")
        return position
    if position["rows"] % processes or len(position["streams"]) % processes:
        raise DataError(
            f"{processes} processes cannot resume after {position['rows']} rows of {len(position['streams'])} streams: "
            "both must be divisible by the number of processes"
        )
    part = {"process": [process, processes], "order": position["order"], "rows": position["rows"]}
    return part | {name: position[name][process::processes] for name in BY_STREAM}
