"""The exact position in the data: a process holds its part, a checkpoint the whole, for any number of processes.

The whole is JSON: `order` (whatever fixes the order of the rows), `rows` (handed out by all processes together),
`streams` and `skipped` (six and four integers for each of the V virtual streams). A process's part has the same fields,
of its own streams only, and `process` = [p, P]; what else it holds is not part of the position.
"""

from collections.abc import Sequence
from typing import Any

from jax_huginn.data.sources.files import DataError

Position = dict[str, Any]
BY_STREAM = ("streams", "skipped")


def whole_position(parts: Sequence[Position]) -> Position:
    """The parts of all P processes, in any order, after the same number of batches, as one."""
    ordered = sorted(parts, key=lambda part: part["process"])
    if [part["process"] for part in ordered] != [[process, len(parts)] for process in range(len(parts))]:
        raise DataError(f"{len(parts)} parts of a position are of the processes {[part['process'] for part in parts]}")
    for name in ("order", "rows"):
        if any(part[name] != ordered[0][name] for part in ordered):
            raise DataError(f"parts of a position differ in {name}: {[part[name] for part in ordered]}")
    whole = {"order": ordered[0]["order"], "rows": ordered[0]["rows"]}
    for name in BY_STREAM:
        count = sum(len(part[name]) for part in ordered)
        whole[name] = [ordered[index % len(parts)][name][index // len(parts)] for index in range(count)]
    return whole


def local_part(position: Position, process: int, processes: int) -> Position:
    """Of a whole position, the part of process `process` of `processes`; its own part is returned as it is."""
    if "process" in position:
        if position["process"] != [process, processes]:
            raise DataError(f"a position of process {position['process']} is not that of {[process, processes]}")
        return position
    if position["rows"] % processes or len(position["streams"]) % processes:
        raise DataError(
            f"{processes} processes cannot go on after {position['rows']} rows of {len(position['streams'])} streams: "
            "both must be divisible by the number of processes"
        )
    part = {"process": [process, processes], "order": position["order"], "rows": position["rows"]}
    return part | {name: position[name][process::processes] for name in BY_STREAM}
