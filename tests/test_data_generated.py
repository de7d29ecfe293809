"""Generated rows: right answers, alone learnt; a pure function of seed and row; a run that resumes exactly."""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from transformers import AutoTokenizer

from jax_huginn import load_checkpoint
from jax_huginn.config.checks import ConfigError
from jax_huginn.config.schema import DataConfig
from jax_huginn.data.generated import GeneratedRows, held_out_rows
from jax_huginn.data.pipeline import build_data
from jax_huginn.data.resume import whole_position
from jax_huginn.data.rows import IGNORE, Row
from jax_huginn.data.sources.files import DataError
from jax_huginn.data.tasks import TASKS, ShellGame
from jax_huginn.training.loop import train

PAIRS = dict(zip("ABCDEFGHIJ", ["12", "13", "14", "15", "23", "24", "25", "34", "35", "45"], strict=True))


@pytest.fixture
def config(make_config, tmp_path):
    config = make_config(
        model={"vocab_size": 17, "core_layers": 1, "prelude_layers": 0, "coda_layers": 0},
        moe={"experts": 0},
        train={"steps": 4, "batch_size": 4, "micro_batches": 2, "sequence_length": 40},
        data={"source": "generated", "difficulty": 6, "test_difficulty": 9, "curriculum_rows": 100},
        validation={"sequences": 8, "every": 0, "depths": (1, 3)},
        checkpoint={"every": 2},
        log={"tensorboard": False},
    )
    return dataclasses.replace(config, run_dir=str(tmp_path / "run"))


def text_of(row: Row) -> str:
    return "".join(ShellGame.alphabet[token] for token in row.tokens)


def play(game: str) -> str:
    cups, start, swaps = ["."] * 5, int(game[0]) - 1, game[1 : game.index("=")]
    cups[start] = "ball"
    for one, other in (map(int, PAIRS[letter]) for letter in swaps):
        cups[one - 1], cups[other - 1] = cups[other - 1], cups[one - 1]
    return str(cups.index("ball") + 1)


def test_games_are_answered_right_and_only_answers_are_learnt():
    rows = held_out_rows("shell_game", count=200, length=40, hardest=12, seed=0)
    counts = []
    for row in rows:
        text = text_of(row)
        learnt = np.flatnonzero(row.labels != IGNORE)
        assert [text[i] for i in learnt] == ["="] * text.count("=")
        for i in learnt:
            game = text[text.rindex("\n", 0, i) + 1 : i + 2]
            assert game[-1] == play(game) == ShellGame.alphabet[row.labels[i]]
            assert row.groups[i] == len(game) - 3
        assert (row.groups > 0).sum() == len(learnt)
        counts += row.groups[learnt].tolist()
    assert set(counts) == set(range(1, 13))
    answers = np.concatenate([row.labels[row.labels != IGNORE] for row in rows])
    assert np.bincount(answers).min() > 0.7 * len(answers) / 5


def rearrange(factors: str) -> str:
    """The element that rearranges ABC as the factors do, one after the other."""
    ways = dict(zip("abcdef", ["ABC", "ACB", "BAC", "BCA", "CAB", "CBA"], strict=True))
    things = "ABC"
    for factor in factors:
        things = "".join(things["ABC".index(place)] for place in ways[factor])
    return next(letter for letter, way in ways.items() if way == things)


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("products", rearrange),
        ("last_digit", lambda digits: str(sum(map(int, digits)))[-1]),
        ("most_frequent", lambda letters: sorted(letters, key=lambda each: (-letters.count(each), each))[0]),
    ],
)
def test_the_other_tasks_are_answered_right(name, answer):
    task, counts = TASKS[name], set()
    for row in held_out_rows(name, count=50, length=40, hardest=12, seed=0):
        text = "".join(task.alphabet[token] for token in row.tokens)
        for i in np.flatnonzero(row.labels != IGNORE):
            question = text[text.rindex("\n", 0, i) + 1 : i + 1].removesuffix("=")
            assert task.alphabet[row.labels[i]] == answer(question)
            assert row.groups[i] == len(question)
            counts.add(len(question))
    assert counts == set(range(1, 13))
    for difficulty in (1, 32):
        *question, right = task.example(iter(range(7, 40)), difficulty)
        text = "".join(task.alphabet[token] for token in question)
        assert answer(text.strip("\n=")) == task.alphabet[right]


def test_the_curriculum_grows_with_the_row():
    rows = GeneratedRows("shell_game", length=40, difficulty=12, curriculum_rows=1000, seed=0)
    hardest = [max(max(rows.row(begin + i).groups) for i in range(50)) for begin in (0, 500, 1000)]
    assert hardest[0] == 2
    assert hardest[1] == 7
    assert hardest[2] == 12


def test_processes_share_the_rows_and_resume_in_any_number(config, tmp_path):
    def batches(count, process=0, processes=1, position=None, **data):
        changed = dataclasses.replace(config, data=dataclasses.replace(config.data, **data))
        opened = build_data(changed, tmp_path / "tokenizer", process=process, processes=processes)
        if position:
            opened.train.set_state(position)
        taken = [next(opened.train) for _ in range(count)]
        end = opened.train.get_state()
        opened.train.close()
        return taken, end

    alone, _ = batches(5)
    assert not np.array_equal(alone[0]["tokens"], alone[1]["tokens"])
    parts = [batches(3, process, 2) for process in range(2)]
    for p, (taken, _) in enumerate(parts):
        for whole, part in zip(alone, taken, strict=False):
            np.testing.assert_array_equal(whole["labels"][p::2], part["labels"])
    position = json.loads(json.dumps(whole_position([end for _, end in parts])))
    resumed, end = batches(2, position=position)
    assert end["rows"] == 5 * config.train.batch_size
    for a, b in zip(alone[3:], resumed, strict=True):
        np.testing.assert_array_equal(a["tokens"], b["tokens"])
    with pytest.raises(DataError, match="difficulty=6, this run difficulty=7"):
        batches(1, position=position, difficulty=7)


def test_the_tokenizer_has_a_token_for_each_character(config, tmp_path):
    build_data(config, tmp_path / "tokenizer").train.close()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    ids = tokenizer("\n2CAFJB=4\n")["input_ids"]
    assert ids == ["12345ABCDEFGHIJ=\n".index(character) for character in "\n2CAFJB=4\n"]
    assert tokenizer.decode(ids) == "\n2CAFJB=4\n"
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == 16
    with pytest.raises(Exception, match="WordLevel"):
        tokenizer("2xA=")


def test_what_cannot_work_is_refused(config, tmp_path):
    short = dataclasses.replace(config, train=dataclasses.replace(config.train, sequence_length=12))
    with pytest.raises(DataError, match=r"sequence_length=12 is too short .* difficulty 9 has 13 tokens"):
        build_data(short, tmp_path)
    with pytest.raises(ConfigError, match=r"data\.source=generated has a tokenizer of its own"):
        DataConfig(source="generated", tokenizer="gpt2")


def test_a_run_resumes_bit_for_bit_and_reports_accuracy_by_difficulty(config, tmp_path, capsys):
    train(config)
    assert "accuracy by recurrences r and group" in capsys.readouterr().out
    run, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(run, other)
    shutil.rmtree(other / "checkpoints/4")
    train(dataclasses.replace(config, run_dir=str(other)))
    assert "resuming" in capsys.readouterr().out
    last, again = (json.loads((each / "metrics.jsonl").read_text().splitlines()[-1]) for each in (run, other))
    times = {"tokens_per_second", "tflops_per_second", "mfu"}
    assert last.keys() == again.keys() >= {"val_accuracy_r1", "val_accuracy_r3_by_group"}
    assert {name: last[name] for name in last.keys() - times} == {name: again[name] for name in last.keys() - times}

    model = load_checkpoint(run)
    right, all_labels = np.zeros(10, int), np.zeros(10, int)
    for row in held_out_rows("shell_game", count=8, length=40, hardest=9, seed=0):
        best = model(jnp.asarray(row.tokens[None]), (3, 0)).logits[0].argmax(-1)
        np.add.at(right, row.groups, np.asarray(best) == row.labels)
        np.add.at(all_labels, row.groups[row.groups > 0], 1)
    groups = np.flatnonzero(all_labels)
    assert (last["val_groups"], last["val_group_labels"]) == (groups.tolist(), all_labels[groups].tolist())
    assert last["val_accuracy_r3"] == pytest.approx(right.sum() / all_labels.sum())
    np.testing.assert_allclose(last["val_accuracy_r3_by_group"], right[groups] / all_labels[groups])
