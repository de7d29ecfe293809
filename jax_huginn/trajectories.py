"""python -m jax_huginn.trajectories SOURCE --prompt TEXT: draw how each token's state moves over the recurrences.

The page shows what is read out of every recurrence, how fast states come to rest, and their paths.
"""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval_tasks.loading import encode, load_tokenizer
from jax_huginn.config.checks import UserError, require
from jax_huginn.config.cli import OneLineParser, run_verb
from jax_huginn.visualization import trajectory_charts
from jax_huginn.visualization.page import write_page
from jax_huginn.visualization.paper import write_plots
from jax_huginn.visualization.results import model_name

if TYPE_CHECKING:
    from jax_huginn.model.huginn import MoEHuginnModel
    from jax_huginn.visualization.trajectory_charts import Trajectories


def main() -> None:
    parser = OneLineParser(prog="python -m jax_huginn.trajectories", description=__doc__)
    add = parser.add_argument
    add(
        "source",
        metavar="SOURCE",
        help="run folder (its newest checkpoint), step folder, .pth, Hugging Face folder or name",
    )
    add("--prompt", required=True, metavar="TEXT", help="the text to read; BOS is put before it")
    add("--recurrence", type=int, metavar="R", help="recurrences (twice the model's mean depth)")
    add("--top", type=int, default=5, metavar="N", help="predictions of every cell, shown when pointed at (5)")
    add("--tokenizer_path", metavar="DIR", help="folder or hub name that AutoTokenizer loads; by default the source's")
    add("--out", type=Path, default=Path("trajectories.html"), metavar="FILE", help="the page (trajectories.html)")
    add("--plots", type=Path, metavar="FOLDER", help="also write every chart there as PNG and SVG")
    options = parser.parse_args()
    for name in ("recurrence", "top"):
        value = getattr(options, name)
        require(value is None or value > 0, f"--{name} {value} must be positive")
    if options.out.is_dir():
        raise UserError(f"--out {options.out} is a folder: name a file in it")

    # Imported here, so that --help and a mistyped option are answered without waiting for JAX.
    from jax_huginn.checkpoints.sources import load_for_inference, open_source

    source = open_source(options.source)
    tokenizer_path = options.tokenizer_path or source.tokenizer
    if tokenizer_path is None:
        raise UserError(f"--tokenizer_path is needed: {source.path} comes without a tokenizer")
    tokenizer = load_tokenizer(str(tokenizer_path), "--tokenizer_path")
    recurrence = options.recurrence or 2 * source.config.recurrence.mean
    seen = look(load_for_inference(source), tokenizer, options.prompt, recurrence, options.top)
    about = f"{source.path}, {recurrence} recurrences, {len(seen.tokens)} tokens"
    head = (
        f"<h1>{escape(model_name(source.path))}</h1>\n<p class='soft'>{escape(about)}</p>\n"
        f"<p class='card' style='margin-top: 12px; white-space: pre-wrap'>{escape(options.prompt)}</p>"
    )
    sections = trajectory_charts.sections(seen)
    write_page(options.out, "Trajectories", head, sections, {})
    print(f"wrote {options.out}")
    if options.plots is not None:
        count = write_plots((chart for section in sections for chart in section.charts), options.plots)
        print(f"wrote {count} charts as PNG and SVG into {options.plots}")


def look(model: MoEHuginnModel, tokenizer: Any, prompt: str, recurrence: int, top: int) -> Trajectories:
    """What every recurrence makes of the prompt.

    Raises:
        UserError: the prompt does not fit the model.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jax_huginn.inference.iterations import return_iterations

    bos = tokenizer.bos_token_id
    tokens = ([] if bos is None else [bos]) + encode(tokenizer, prompt, "--prompt")
    most, vocabulary = model.config.model.max_length, model.config.model.vocab_size
    if not tokens or len(tokens) > most:
        raise UserError(f"--prompt has {len(tokens)} tokens with BOS: the model reads 1 to {most}")
    if max(tokens) >= vocabulary:
        raise UserError(f"the tokenizer has {len(tokenizer)} tokens, more than the model's {vocabulary}")
    found = jax.device_get(return_iterations(model, jnp.array([tokens]), recurrence, min(top, vocabulary)))
    words = {token: _word(tokenizer, token) for token in {*tokens, *found.top_tokens.ravel().tolist()}}
    top_lists = [
        [
            [(words[token], float(np.exp(log_p))) for token, log_p in zip(*cell, strict=True)]
            for cell in zip(ids.tolist(), log_ps.tolist(), strict=True)
        ]
        for ids, log_ps in zip(found.top_tokens[:, 0], found.top_log_p[:, 0], strict=True)
    ]
    return trajectory_charts.Trajectories(
        [words[token] for token in tokens],
        found.states_RBSD[:, 0],
        found.entropy_RBS[:, 0],
        found.loss_RBS[:, 0],
        top_lists,
    )


def _word(tokenizer: Any, token: int) -> str:
    """A token's text with its white space made visible."""
    text = tokenizer.decode([token])
    for blank, sign in ((" ", "·"), ("\n", "↵"), ("\t", "⇥")):
        text = text.replace(blank, sign)
    return "".join(each if each.isprintable() else "�" for each in text) or "∅"


if __name__ == "__main__":
    run_verb(main)
