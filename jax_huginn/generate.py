"""python -m jax_huginn.generate SOURCE --prompt TEXT --recurrence 32: continue texts, thinking as long as asked.

With --prompts FILE, lines of JSON with a "prompt", all texts are continued in one batch, each as it would be alone.
With --interactive, lines are read from the terminal and answered as they are written; /help lists what changes there.
A prompt is a message where the tokenizer has a chat template; elsewhere it is text that is continued, after BOS.
"""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax_huginn.config.checks import ConfigError, UserError, require
from jax_huginn.config.cli import OneLineParser, run_verb
from jax_huginn.files import reason, whole_file
from jax_huginn.writing import Settings, Writer, open_writer, summary, sums

if TYPE_CHECKING:
    from jax_huginn.inference import Exit, Generated, Totals

COMMANDS = """/r N          recurrences of a token, or the most of them with an exit
/exit NAME    exit criterion, for example kl; /exit none thinks /r recurrences
/t X          temperature; 0 is greedy
/n N          most new tokens of an answer
/reset        forget the conversation; only with a chat template
/quit         end, as Ctrl-D does; Ctrl-C ends an answer and keeps what was written"""


def main(arguments: Sequence[str] | None = None) -> None:
    options = make_parser().parse_args(_underscores(sys.argv[1:] if arguments is None else arguments))
    settings = settings_of(options)
    if options.prompts is not None:
        require(options.out is not None, "--prompts needs --out FILE.jsonl for the results")
        if Path(options.out).exists():
            raise UserError(f"--out {options.out} exists already, and is not overwritten")
        if not Path(options.out).absolute().parent.is_dir():
            raise UserError(f"--out {options.out}: there is no folder {Path(options.out).parent}")
        records = read_prompts(Path(options.prompts))
        require(options.batch_size > 0, f"--batch_size {options.batch_size} must be positive")
        write_answers(_open(options), records, settings, options.batch_size, Path(options.out))
        return
    require(options.out is None, "--out belongs to --prompts; without it the text goes to the terminal")
    if options.interactive:
        converse(_open(options), settings)
    else:
        require(options.prompt is not None, "give --prompt TEXT, --prompts FILE.jsonl or --interactive")
        stream(_open(options), options.prompt, settings)


def make_parser() -> OneLineParser:
    parser = OneLineParser(
        prog="python -m jax_huginn.generate", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add(
        "source", metavar="SOURCE",
        help="run folder (its newest checkpoint), step folder, .pth, Hugging Face folder or name",
    )  # fmt: skip
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--prompt", metavar="TEXT", help="text to continue, or the message of a chat")
    what.add_argument("--prompts", metavar="FILE.jsonl", help='objects with "prompt"; other keys come back unchanged')
    what.add_argument("--interactive", action="store_true", help="read prompts from the terminal")
    add("--out", metavar="FILE.jsonl", help="where the results of --prompts are written, one object a line")
    add("--batch_size", type=int, default=16, metavar="N",
        help="texts of --prompts at once (16), each thinking at its own pace; changes no text")  # fmt: skip
    add("--plain", action="store_true", help="continue the prompt as text even if the tokenizer has a chat template")
    add("--max_new_tokens", type=int, default=128, metavar="N", help="most new tokens of a text (128)")
    add("--recurrence", type=int, metavar="R", help="recurrences of a token (the mean of its training)")
    add("--exit", metavar="NAME", help="criterion by which a token stops before R recurrences, for example kl")
    add("--exit_threshold", type=float, metavar="T", help="of the criterion; each has a default but acceleration")
    add("--exit_entropy", type=float, metavar="NATS", help="largest entropy at which kl-entropy exits (0.3)")
    add("--exit_every", type=int, metavar="M", help="test the criterion every M recurrences (1)")
    add("--min_steps", type=int, metavar="N", help="recurrences before which no token exits (1)")
    add("--speculate", type=int, metavar="N", help="draft N tokens, then verify them in one pass; changes no text")
    add("--draft_recurrence", type=int, metavar="R", help="recurrences of a draft, with --speculate")
    add("--warm_start", action="store_true", help="a token starts from the last one's state, not from the fixed one")
    add("--cache.policy", dest="policy", default="full", metavar="POLICY",
        help="recurrences with own keys and values. full: all. mod: --cache.budget. last: one (full)")  # fmt: skip
    add("--cache.budget", dest="budget", type=int, default=0, metavar="SLOTS", help="with --cache.policy mod")
    add("--temperature", type=float, default=0.0, metavar="X", help="of sampling; 0 is greedy (0)")
    add("--top_k", type=int, default=0, metavar="K", help="sample from the K most likely tokens; 0: from all (0)")
    add("--top_p", type=float, default=1.0, metavar="P", help="from the most likely tokens that reach P together (1)")
    add("--min_p", type=float, default=0.0, metavar="P", help="from tokens with at least P of the largest's (0)")
    add("--repetition_penalty", type=float, default=1.0, metavar="X", help="on tokens that are there already; 1: none")
    add("--seed", type=int, default=0, metavar="N", help="of sampling; text i of a file has seed N + i (0)")
    add("--stop", action="append", default=[], metavar="TEXT", help="ends a text before TEXT; may be repeated")
    add("--dtype", choices=("bfloat16", "float32", "float64"), help="type to compute in (the model's own)")
    add("--parallel.data", dest="data", type=int, default=1, metavar="N",
        help="groups of devices over which the texts are spread; -1: all (1)")  # fmt: skip
    add("--parallel.fsdp", dest="fsdp", type=int, default=1, metavar="N",
        help="devices of a group, over which the weights are spread; -1: all (1)")  # fmt: skip
    add("--tokenizer_path", metavar="DIR", help="folder or hub name that AutoTokenizer loads; by default the source's")
    return parser


def _underscores(words: Sequence[str]) -> list[str]:
    """Options with underscores, as they are declared; dashes are accepted too."""
    normal = []
    for word in words:
        name, equals, value = word.partition("=")
        normal.append("--" + name[2:].replace("-", "_") + equals + value if name.startswith("--") else word)
    return normal


def settings_of(options: argparse.Namespace) -> Settings:
    """From the command line; raises ConfigError for what can be seen to be wrong before anything is loaded."""
    from jax_huginn.inference import Drafts, Sampling
    from jax_huginn.inference.cache import slots_of

    require(options.max_new_tokens > 0, f"--max_new_tokens {options.max_new_tokens} must be positive")
    require(
        options.recurrence is None or options.recurrence > 0, f"--recurrence {options.recurrence} must be 1 or more"
    )
    require(0 <= options.seed < 2**31, f"--seed {options.seed} must lie in [0, 2^31)")
    require(all(options.stop), "--stop '' would end every text at once: give a text")
    for name, size in (("data", options.data), ("fsdp", options.fsdp)):
        require(size > 0 or size == -1, f"--parallel.{name} {size} must be positive, or -1 for all")
    require(max(options.data, options.fsdp) > 0, "--parallel.data and --parallel.fsdp are both -1: give one a number")
    slots_of(options.policy, options.budget, 1)
    for name in ("exit_threshold", "exit_entropy", "exit_every", "min_steps"):
        require(options.exit or getattr(options, name) is None, f"--{name} needs --exit NAME")
    together = (options.speculate is None) == (options.draft_recurrence is None)
    require(together, "--speculate N and --draft_recurrence R belong together")
    drafts = None if options.speculate is None else Drafts(options.speculate, options.draft_recurrence)
    sampling = Sampling(options.repetition_penalty, options.temperature, options.top_k, options.top_p, options.min_p)
    return Settings(
        options.max_new_tokens, options.recurrence, exit_of(options.exit, options), sampling, options.policy,
        options.budget, options.warm_start, drafts, options.seed, tuple(options.stop),
    )  # fmt: skip


def exit_of(name: str | None, options: argparse.Namespace | None = None) -> "Exit | None":
    """The criterion of that name with the options that are given; None and "none" think to the end."""
    from jax_huginn.inference import Exit

    if name in (None, "none"):
        return None
    names = {"threshold": "exit_threshold", "entropy": "exit_entropy", "every": "exit_every", "min_steps": "min_steps"}
    given = {field: getattr(options, option, None) for field, option in names.items()}
    return Exit(name, **{field: value for field, value in given.items() if value is not None})


def _open(options: argparse.Namespace) -> Writer:
    from jax_huginn.training.startup import MEMORY_SHARE

    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", MEMORY_SHARE)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    return open_writer(options.source, options.tokenizer_path, options.dtype, options.data, options.fsdp, options.plain)


# ---- One prompt, a conversation, a file -----------------------------------------------------------------------------


def stream(writer: Writer, prompt: str, settings: Settings) -> None:
    """Write one text to stdout as it is made; Ctrl-C ends it with status 130."""
    tokens = writer.encode(prompt, "--prompt")
    results, totals, _ = writer.write([tokens], settings, [settings.seed], _show)
    print(flush=True)
    print(summary(results, [totals]), file=sys.stderr)
    if results[0].finish_reason == "interrupted":
        sys.exit(130)


def converse(writer: Writer, settings: Settings) -> None:
    """Answer lines from stdin until its end; with a chat template they are one conversation."""
    earlier: list[dict[str, str]] = []
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives input() a history
        print("a prompt, or /help; Ctrl-D ends", file=sys.stderr)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            print()
            return
        try:
            if line.startswith("/"):
                word = line.split()[0]
                if word == "/quit":
                    return
                if word == "/reset":
                    earlier.clear()
                elif word == "/help":
                    print(COMMANDS)
                else:
                    settings = changed(settings, line)
            elif line:
                tokens = writer.encode(line, "the prompt", earlier)
                results, totals, (text,) = writer.write([tokens], settings, [settings.seed], _show)
                print(flush=True)
                print(summary(results, [totals]), file=sys.stderr)
                if writer.chat:
                    earlier += [{"role": "user", "content": line}, {"role": "assistant", "content": text}]
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)


def changed(settings: Settings, line: str) -> Settings:
    """The settings after a command such as `/r 64`."""
    command, *values = line.split()
    known = [each.split()[0] for each in COMMANDS.splitlines()]
    require(command in known, f"{command} is not a command; there are {', '.join(known)}, and /help")
    require(len(values) == 1, f"{command} takes one value, as in /r 64 or /exit kl")
    (value,) = values
    try:
        if command == "/exit":
            return replace(settings, exit=exit_of(value))
        if command == "/t":
            return replace(settings, sampling=replace(settings.sampling, temperature=float(value)))
        number = int(value)
    except ConfigError:
        raise
    except ValueError:
        raise ConfigError(f"{command} {value}: not a number") from None
    require(number > 0, f"{command} {value} must be positive")
    return replace(settings, **{"/r": {"recurrence": number}, "/n": {"max_new_tokens": number}}[command])


RESULTS = ("text", "tokens", "steps", "logprobs", "finish_reason")


def read_prompts(file: Path) -> list[dict[str, Any]]:
    """The objects of a jsonl file; raises UserError, with the line's number, for one without a prompt."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"--prompts {file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"--prompts {file} is not UTF-8 text") from None
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            raise UserError(f"--prompts {file}, line {number}: not JSON") from None
        if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
            raise UserError(f'--prompts {file}, line {number}: not an object with a text under "prompt"')
        for name in RESULTS:
            require(name not in record, f'--prompts {file}, line {number}: results use the key "{name}"; rename it')
        require(bool(record["prompt"]), f"--prompts {file}, line {number}: the prompt is empty")
        records.append(record)
    require(bool(records), f"--prompts {file} holds no prompt")
    return records


def write_answers(
    writer: Writer, records: Sequence[dict[str, Any]], settings: Settings, batch_size: int, out: Path
) -> None:
    """Continue all prompts and write one object a line, in their order; Ctrl-C keeps what was made, status 130."""
    prompts = [writer.encode(record["prompt"], f"prompt {i}") for i, record in enumerate(records, start=1)]
    longest_first = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # what does not fit shows at once
    answers: dict[int, dict[str, Any]] = {}
    everything: list[Generated] = []
    spent: list[Totals] = []
    interrupted = False
    for first in range(0, len(prompts), batch_size):
        batch = longest_first[first : first + batch_size]
        try:
            results, totals, texts = writer.write(
                [prompts[i] for i in batch], settings, [settings.seed + i for i in batch], None
            )
        except KeyboardInterrupt:  # while it was compiled
            interrupted = True
            break
        everything += results
        spent.append(totals)
        for i, result, text in zip(batch, results, texts, strict=True):
            values = {"text": text} | {name: getattr(result, name) for name in RESULTS[1:]}
            answers[i] = records[i] | values
        interrupted = any(result.finish_reason == "interrupted" for result in results)
        if interrupted:
            break
    if answers:
        try:
            with whole_file(out) as unfinished:
                lines = [json.dumps(answers[i]) for i in sorted(answers)]
                unfinished.write_text("\n".join(lines) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--out {out} cannot be written: {reason(error)}") from None
        print(summary(everything, spent), file=sys.stderr)
        print(json.dumps(sums(spent)))
    if interrupted:
        print(f"interrupted: {out} holds {len(answers)} of {len(records)} texts", file=sys.stderr)
        sys.exit(130)


def _show(piece: str) -> None:
    print(piece, end="", flush=True)


if __name__ == "__main__":
    run_verb(main)
