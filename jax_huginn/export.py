"""python -m jax_huginn.export SOURCE --out model.pth|DIR: write a model for PyTorch or as a Hugging Face folder.

Afterwards what was written is read back and compared with the source at several depths: the rounding of `--dtype
bfloat16` compounds over recurrences.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from jax_huginn.config.checks import UserError
from jax_huginn.config.cli import OneLineParser, run_verb

if TYPE_CHECKING:
    import numpy as np

    from jax_huginn.checkpoints.sources import Source

COMPARED_TOKENS = 64


class Difference(NamedTuple):
    """How far the predictions of two models are apart."""

    recurrence: int
    logits: float
    """Largest absolute difference of a logit."""
    kl: float
    """Largest KL divergence of a position, from the first model to the second, in nats."""


def differences(first: Source, second: Source, depths: Sequence[int]) -> list[Difference]:
    """Compare two models on the same random tokens, both computing in float32, or in float64 where the first does."""
    import numpy as np

    found = []
    for depth, a_SV, b_SV in zip(depths, _logits(first, first, depths), _logits(second, first, depths), strict=True):
        log_p_SV, log_q_SV = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (a_SV, b_SV))
        kl_S = (np.exp(log_p_SV) * (log_p_SV - log_q_SV)).sum(axis=-1)
        found.append(Difference(depth, float(abs(a_SV - b_SV).max()), max(float(kl_S.max()), 0.0)))
    return found


def _logits(source: Source, like: Source, depths: Sequence[int]) -> list[np.ndarray]:
    """The logits (S, V) of a source's model at each depth; no weights stay in memory."""
    import jax
    import numpy as np
    from flax import nnx

    from jax_huginn.checkpoints.sources import load_for_inference
    from jax_huginn.model import functional

    shape = like.config.model
    model = load_for_inference(source, "float64" if shape.dtype == "float64" else "float32")
    graphdef, params = functional.split(model)
    length = min(COMPARED_TOKENS, shape.max_length)
    tokens_BS = np.random.default_rng(0).integers(0, shape.vocab_size, (1, length), np.int32)
    run = jax.jit(lambda params, recurrence: nnx.merge(graphdef, params)(tokens_BS, (recurrence, 0)).logits[0])
    return [np.asarray(run(params, np.int32(depth)), np.float64) for depth in depths]


def main() -> None:
    parser = OneLineParser(prog="python -m jax_huginn.export", description=__doc__)
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="run folder (its newest checkpoint), step folder, .pth, Hugging Face folder or name",
    )
    parser.add_argument(
        "--out", required=True, metavar="PATH", help="a .pth file, or a folder to create; an existing one is refused"
    )
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32", "float64"), help="type of the tensors; the weights' own if not given"
    )
    parser.add_argument(
        "--compare", default="1,4,16,32", metavar="R[,R...]",
        help="recurrences at which the export is compared with the source; 0: not at all (1,4,16,32)",
    )  # fmt: skip
    options = parser.parse_args()

    import jax

    from jax_huginn.checkpoints.sources import open_and_load, open_source
    from jax_huginn.interop.errors import ExportError, check_target
    from jax_huginn.interop.huggingface import write_huggingface
    from jax_huginn.interop.pth import write_pth

    out, depths = Path(options.out), _depths(options.compare)
    open_source(options.source)  # mistakes are reported before the model is loaded, which may take a while
    check_target(out)
    if out.suffix in (".pt", ".bin", ".ckpt", ".safetensors"):
        raise ExportError(f"--out {out} is neither a .pth file nor a folder")
    source, model = open_and_load(options.source)
    if out.suffix == ".pth":
        write_pth(model, out, options.dtype)
    else:
        write_huggingface(model, out, source.tokenizer, options.dtype)
    print(f"wrote {out} from {source.path}", flush=True)
    if not depths:
        return
    del model
    if source.config.model.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    print(f"read back and compared with it on {COMPARED_TOKENS} random tokens, largest differences:")
    for recurrence, logits, kl in differences(source, open_source(out), depths):
        print(f"  recurrence {recurrence:>3}  logits {logits:.2e}  KL {kl:.2e} nats")


def _depths(text: str) -> list[int]:
    try:
        depths = [int(word) for word in text.split(",")]
    except ValueError:
        depths = [-1]
    if min(depths) < 0 or (0 in depths and len(depths) > 1):
        raise UserError(f"--compare {text}: not a depth, nor several between commas, nor 0")
    return [depth for depth in depths if depth]


if __name__ == "__main__":
    run_verb(main)
