"""The offline tasks ask about held-out code only, the same every time, and give nothing away."""

import json
import math
import re
import statistics
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from eval_tasks import TASKS, TASKS_FOLDER
from eval_tasks import build as tasks
from eval_tasks.errors import cluster_errors, clustered_error
from jax_huginn.config.checks import ConfigError
from jax_huginn.data.sources.files import stdlib_files
from jax_huginn.data.sources.split import is_held_out
from tests.test_data_generated import play

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def questions() -> list[dict]:
    return tasks.continuation_questions()


@pytest.fixture(scope="module")
def lines_of() -> dict[str, list[str]]:
    return {
        file.relative_path: file.path.read_text(encoding="utf-8").splitlines()
        for file in stdlib_files()
        if is_held_out(file.relative_path, tasks.VALIDATION_FRACTION)
    }


def test_every_question_is_a_place_in_a_held_out_file(questions, lines_of):
    assert len(questions) > 300
    assert len({question["file"] for question in questions}) > 20
    asked = Counter(question["file"] for question in questions)
    assert max(asked.values()) <= tasks.QUESTIONS_PER_FILE
    for question in questions:
        lines, index = lines_of[question["file"]], question["line"] - 1
        right = question["choices"][question["answer"]]
        *context, indent = question["context"].split("\n")
        assert context == lines[index - len(context) : index]
        assert indent.strip() == ""
        assert indent + right == lines[index].rstrip()
        assert len(question["context"]) - len(indent) <= tasks.CONTEXT_CHARACTERS


def test_only_the_order_of_the_names_tells_the_choices_apart(questions):
    """The right one shares neither more words nor more pairs of them with the context, nor is it shorter or longer."""
    known = {
        line.strip()
        for file in stdlib_files()
        for line in file.path.read_text(encoding="utf-8", errors="replace").splitlines()
    }

    def pairs(text: str) -> set:
        words = re.findall(r"\w+|[^\w\s]", text)
        return set(pairwise(words))

    for question in questions:
        choices, context = question["choices"], pairs(question["context"])
        assert len(set(choices)) == 4
        assert len({"".join(sorted(choice)) for choice in choices}) == 1
        assert len({tuple(sorted(re.findall(r"\w+", choice))) for choice in choices}) == 1
        assert len({re.sub(r"\w+", "x", choice) for choice in choices}) == 1
        assert len({len(pairs(choice) & context) for choice in choices}) == 1
        assert [choice in known for choice in choices] == [index == question["answer"] for index in range(4)]
    positions = Counter(question["answer"] for question in questions)
    assert min(positions[answer] for answer in range(4)) > 0.18 * len(questions)


def test_rules_without_a_model_are_at_chance(questions):
    found = tasks.baselines(questions)
    for rule in ("most words of the context", "most adjacent pairs of the context", "shortest"):
        assert found.pop(rule) == pytest.approx(0.25)
    assert found.pop("longest run copied from the context") < 0.3
    assert not found
    knowing = [{"context": "b = a\n", "choices": ["c = a", "a = b", "b = c", "a = c"], "answer": 1}]
    assert tasks.baselines(knowing)["most words of the context"] == 1


def test_only_statements_with_names_to_exchange_are_asked_for():
    source = '''
def function_of_middling_length(argument, other):
    """A docstring that is long enough to ask about."""
    # a comment that is long enough to ask about
    value = call_with(argument,
                      another_argument, of_it)
    text = """
    return inside, of, a, string
    """
    return value + another_value_of_it
    match value, "a string", other:
'''
    found = [(line.indent, line.text) for line in tasks.code_lines("file.py", source)]
    assert found == [
        ("", "def function_of_middling_length(argument, other):"),
        ("    ", "value = call_with(argument,"),
    ]
    (_, line) = tasks.code_lines("file.py", source)
    exchanges = tasks._exchanges(line)
    assert {"call_with = value(argument,", "call_with = argument(value,"} <= exchanges
    assert len(exchanges) == 5  # every order but its own
    assert list(tasks.code_lines("broken.py", source + "(")) == []


def test_pieces_are_disjoint_whole_lines_of_held_out_files(lines_of):
    pieces = tasks.perplexity_pieces()
    assert len(pieces) == tasks.PIECES
    assert len({(piece["file"], piece["piece"]) for piece in pieces}) == len(pieces)
    for piece in pieces:
        assert tasks.PIECE_BYTES <= len(piece["text"].encode()) < tasks.PIECE_BYTES + 500
        assert piece["text"].splitlines()[0] in lines_of[piece["file"]]
        assert piece["text"].endswith("\n")


def test_its_command_makes_no_folder_for_help_or_a_mistake(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as done:
        tasks.main(["--help"])
    assert done.value.code == 0
    assert "folder to write the data into" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="unknown option --hlep; did you mean --help"):
        tasks.main(["--hlep"])
    assert list(tmp_path.iterdir()) == []


def test_questions_of_one_file_do_not_count_as_many():
    """Errors by clusters: of one question a file as usual; copies of a question add nothing."""
    values = [1.0, 0.0, 0.0, 1.0, 1.0]
    one = clustered_error(values, [1.0] * 5, range(5))
    assert one == pytest.approx(statistics.stdev(values) / math.sqrt(5))
    assert clustered_error(values * 3, [1.0] * 15, [*range(5)] * 3) == pytest.approx(one)
    # By hand: means 2/3 overall; files deviate by 2 - 2 * 2/3 = 2/3 and 0 - 2/3, so sqrt(2/1 * 2 * 4/9) / 3.
    assert clustered_error([1, 1, 0], [1, 1, 1], "aab") == pytest.approx(math.sqrt(16 / 9) / 3)
    # A ratio does not depend on how its parts are cut.
    assert clustered_error([3, 1], [2, 2], "ab") == pytest.approx(clustered_error([1, 2, 1], [1, 1, 2], "aab"))
    assert math.isnan(clustered_error([1, 0], [1, 1], "aa"))


def test_the_printed_errors_are_those_of_files():
    samples = [
        {"doc": {"file": file}, "metrics": ["acc", "bits_per_byte"], "acc": acc, "bits_per_byte": (-nats, size)}
        for file, acc, nats, size in (("a", 1.0, 20.0, 10), ("a", 1.0, 30.0, 12), ("b", 0.0, 10.0, 9))
    ]
    results = {"acc,none": 2 / 3, "acc_stderr,none": 0.3, "bits_per_byte_stderr,none": "N/A"}
    cluster_errors(results, "file", samples)
    assert results["acc_stderr,none"] == pytest.approx(4 / 9)
    bits = [nats / math.log(2) for nats in (20.0, 30.0, 10.0)]
    assert results["bits_per_byte_stderr,none"] == clustered_error(bits, [10, 12, 9], "aab")


def test_building_again_gives_the_same_bytes(tmp_path):
    tasks.build(tmp_path / "data")
    first = {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()}
    assert sorted(first) == ["stdlib_continuation.jsonl", "stdlib_perplexity.jsonl"]
    command = [sys.executable, "-m", "eval_tasks.build", str(tmp_path / "data")]  # another hash seed, the same bytes
    subprocess.run(command, cwd=ROOT, check=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()} == first
    rows = [json.loads(line) for line in first["stdlib_continuation.jsonl"].splitlines()]
    assert rows == tasks.continuation_questions()


def test_another_validation_share_asks_about_other_files():
    files = {question["file"] for question in tasks.continuation_questions(0.02)}
    assert files
    assert all(is_held_out(file, 0.02) for file in files)


def test_lm_eval_loads_the_tasks_as_they_were_built(questions):
    from lm_eval.tasks import TaskManager

    assert TASKS == ("shell_game", "stdlib_continuation", "stdlib_perplexity")
    loaded = TaskManager(include_path=TASKS_FOLDER, include_defaults=False).load(list(TASKS))["tasks"]
    documents = list(loaded["stdlib_continuation"].test_docs())
    assert documents == questions
    task = loaded["stdlib_continuation"]
    task.build_all_requests(limit=3)
    first = [instance.args for instance in task.instances[:4]]
    assert first == [(questions[0]["context"], choice) for choice in questions[0]["choices"]]
    pieces = [row["text"] for row in loaded["stdlib_perplexity"].test_docs()]
    assert pieces == [row["text"] for row in tasks.perplexity_pieces()]
    games = list(loaded["shell_game"].test_docs())
    assert {len(game["context"]) - 2 for game in games} == set(range(1, 33))
    assert all(play(game["context"]) == game["choices"][game["answer"]] for game in games)
    loaded["shell_game"].build_all_requests(limit=1)
    assert [each.args for each in loaded["shell_game"].instances] == [(games[0]["context"], cup) for cup in "12345"]


def test_the_builder_imports_neither_jax_nor_torch():
    code = "import sys, eval_tasks.build; sys.exit(any(name in sys.modules for name in ('jax', 'torch', 'datasets')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
