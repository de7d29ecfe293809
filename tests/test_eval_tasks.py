"""The offline tasks ask about held-out code only, the same every time, and give nothing away."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from eval_tasks import TASKS, TASKS_FOLDER
from eval_tasks import build as tasks
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
    assert 300 <= len(questions) <= tasks.QUESTIONS
    for question in questions:
        lines, index = lines_of[question["file"]], question["line"] - 1
        right = question["choices"][question["answer"]]
        *context, indent = question["context"].split("\n")
        assert context == lines[index - tasks.CONTEXT_LINES : index]
        assert indent.strip() == ""
        assert indent + right == lines[index].rstrip()
        assert len(set(question["choices"])) == 4


def test_choices_occur_once_in_the_library_and_the_wrong_ones_in_other_held_out_files(questions, lines_of):
    everywhere = Counter(
        line.strip()
        for file in stdlib_files()
        for line in file.path.read_text(encoding="utf-8", errors="replace").splitlines()
    )
    place = {line.strip(): (name, line) for name, lines in lines_of.items() for line in lines}
    for question in questions:
        indent = question["context"].rpartition("\n")[2]
        for index, choice in enumerate(question["choices"]):
            assert everywhere[choice] == 1
            file, line = place[choice]
            assert (file == question["file"]) == (index == question["answer"])
            assert line.rstrip() == indent + choice  # indented alike


def test_neither_position_nor_length_gives_the_answer_away(questions):
    positions = Counter(question["answer"] for question in questions)
    assert min(positions[answer] for answer in range(4)) > 0.18 * len(questions)
    for longest in (True, False):
        hits = sum(
            question["answer"] == sorted(range(4), key=lambda i: len(question["choices"][i]), reverse=longest)[0]
            for question in questions
        )
        assert 0.18 < hits / len(questions) < 0.33  # chance is 0.25, three standard errors 0.065
    for question in questions:
        right = len(question["choices"][question["answer"]])
        assert all(0.8 * right <= len(choice) <= 1.2 * right for choice in question["choices"])


def test_only_statements_are_asked_for():
    source = (
        "\n".join(["x = 1"] * 20)
        + '''
def function_of_middling_length(argument):
    """A docstring that is long enough to ask about."""
    # a comment that is long enough to ask about
    value = call_with(argument,
                      another_argument_of_it)
    text = """
    return inside_of_a_string_literal
    """
    return value + another_value_of_it
'''
    )
    found = [line.text for line in tasks.code_lines("file.py", source)]
    assert found == [
        "def function_of_middling_length(argument):",
        "value = call_with(argument,",
        "return value + another_value_of_it",
    ]
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
