"""Self-speculation with a trained model: how many drafts are accepted, and tokens/s beside plain decoding.

    python benchmarks/speculation.py runs/moe                    # batch 1, 32 prompts, r = 8

Prompts are the beginnings of held-out pieces of Python's standard library, continued greedily one after the other.
`differing` counts texts that are not those of plain decoding; rounding alone can make some differ.
"""

import sys
from argparse import RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import parse, report
from benchmarks.pieces import model_and_pieces
from jax_huginn.config.cli import OneLineParser, run_verb
from jax_huginn.inference import Drafts, generate


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--recurrence", type=int, default=8)
    parser.add_argument("--draft-recurrences", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--drafts", type=int, nargs="*", default=[1, 2, 4, 8])
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--context", type=int, default=64, help="tokens of a prompt (64)")
    parser.add_argument("--new", type=int, default=96, help="new tokens (96)")
    options, _ = parse(parser)
    model, rows, _ = model_and_pieces(options.source, options.context, options.prompts)
    prompts = rows.tolist()
    plain = continued(model, prompts, options, None)
    shape = {"recurrence": options.recurrence, "prompts": options.prompts, "new_tokens": options.new}
    report(benchmark="speculation", **shape, tokens_per_second=plain["speed"])
    for recurrence in options.draft_recurrences:
        for number in options.drafts:
            quick = continued(model, prompts, options, Drafts(number, recurrence))
            report(
                benchmark="speculation", **shape, drafts=number, draft_recurrence=recurrence,
                accepted=quick["accepted"] / quick["drafted"], tokens_per_cycle=quick["tokens"] / quick["cycles"],
                tokens_per_second=quick["speed"], plain_tokens_per_second=plain["speed"],
                differing=sum(a != b for a, b in zip(plain["texts"], quick["texts"], strict=True)),
            )  # fmt: skip


def continued(model: Any, prompts: list[list[int]], options: Any, drafts: Drafts | None) -> dict[str, Any]:
    """Texts and totals over all prompts; what the first call costs is not counted."""
    found = []
    for prompt in (prompts[0], *prompts):
        (row,), totals = generate(
            model, [prompt], max_new_tokens=options.new, recurrence=options.recurrence, drafts=drafts
        )
        found.append((row.tokens, totals))
    every = [totals for _, totals in found[1:]]
    tokens, seconds = sum(each.tokens - 1 for each in every), sum(each.decode_seconds for each in every)
    return {
        "texts": [text for text, _ in found[1:]],
        "tokens": tokens,
        "speed": tokens / seconds,
        "accepted": sum(each.accepted for each in every),
        "drafted": sum(each.drafted for each in every),
        "cycles": drafts and sum(each.readouts for each in every) / (drafts.number + 1),
    }


if __name__ == "__main__":
    run_verb(main)
