"""`python -m jax_huginn.generate`: files, streams, conversations, and one line for every mistake."""

import io
import json

import pytest

from jax_huginn import generate as verb
from jax_huginn import writing
from jax_huginn.config.cli import run_verb
from jax_huginn.inference import cache as caches
from jax_huginn.interop.huggingface import write_huggingface
from tests.evaluation_support import BOS, EOS, make_tokenizer
from tests.generation_support import model_of

PROMPTS = ["def f(x):", "a", "for i in range(10):\n    print"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Hugging Face folder with a tokenizer of bytes."""
    place = tmp_path_factory.mktemp("verb")
    make_tokenizer().save_pretrained(place / "tokenizer")
    model = model_of("dense", "float32", model={"vocab_size": 264})
    model.wte[...] = model.wte[...].at[EOS].set(0)  # never among the likely ones
    write_huggingface(model, place / "hf", place / "tokenizer")
    return place


def command(folder, *words: str) -> list[str]:
    return [str(folder / "hf"), "--recurrence", "3", "--max_new_tokens", "8", *words]


def ask(folder, tmp_path, *words: str) -> list[dict]:
    """Results for the prompts in a file."""
    (tmp_path / "in.jsonl").write_text(
        "".join(json.dumps({"id": i, "prompt": p}) + "\n" for i, p in enumerate(PROMPTS))
    )
    out = tmp_path / "out.jsonl"
    out.unlink(missing_ok=True)
    verb.main(command(folder, "--prompts", str(tmp_path / "in.jsonl"), "--out", str(out), *words))
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_a_file_of_prompts_is_answered_in_its_order_whatever_the_batch(folder, tmp_path, capsys):
    sampled = ("--temperature", "0.7", "--seed", "5", "--top-k", "50")
    rows = ask(folder, tmp_path, *sampled)
    assert [row["id"] for row in rows] == [0, 1, 2]
    assert [row["prompt"] for row in rows] == PROMPTS
    tokenizer = make_tokenizer()
    for row in rows:
        assert row["text"] == tokenizer.decode(row["tokens"], skip_special_tokens=True)
        assert len(row["tokens"]) == len(row["logprobs"]) == len(row["steps"]) == 8
        assert set(row["steps"]) == {3}
        assert row["finish_reason"] == "length"
    totals = json.loads(capsys.readouterr().out)
    assert totals["tokens"] == 24
    assert totals["used"] == totals["computed"] == 3 * 7 * 3
    alone = ask(folder, tmp_path, *sampled, "--batch_size=1")
    assert [row["tokens"] for row in alone] == [row["tokens"] for row in rows]


def test_a_stop_string_ends_a_text_before_it(folder, tmp_path):
    whole = ask(folder, tmp_path)
    texts = [row["text"] for row in whole]
    stop = texts[0][2:5]
    rows = ask(folder, tmp_path, "--stop", stop)
    assert rows[0]["text"] == texts[0][: texts[0].index(stop)]
    assert rows[0]["finish_reason"] == "stop"
    assert rows[0]["tokens"] == whole[0]["tokens"][: len(rows[0]["tokens"])]
    assert len(rows[0]["steps"]) == len(rows[0]["logprobs"]) == len(rows[0]["tokens"])


def test_drafts_change_no_text(folder, tmp_path, capsys):
    whole = ask(folder, tmp_path)
    capsys.readouterr()
    quick = ask(folder, tmp_path, "--speculate", "2", "--draft_recurrence", "1")
    assert [(row["tokens"], row["steps"]) for row in quick] == [(row["tokens"], row["steps"]) for row in whole]
    captured = capsys.readouterr()
    totals = json.loads(captured.out)
    assert f"{totals['accepted'] / totals['drafted']:.0%} of drafts accepted" in captured.err


def test_a_stream_and_a_conversation_write_what_a_file_gets(folder, tmp_path, capsys, monkeypatch):
    texts = [row["text"] for row in ask(folder, tmp_path)]
    capsys.readouterr()
    verb.main(command(folder, "--prompt", PROMPTS[0]))
    captured = capsys.readouterr()
    assert captured.out == texts[0] + "\n"
    assert "8 tokens; " in captured.err
    assert "mean steps 3.0; computed 3.0 a token; cache " in captured.err
    lines = f"{PROMPTS[0]}\n/exit kll\n/r\n/r 2\n/exit cosine\n{PROMPTS[1]}\n/quit\nnever read\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    verb.main(command(folder, "--interactive"))
    captured = capsys.readouterr()
    assert captured.out.startswith(texts[0] + "\n")
    errors = captured.err.splitlines()
    assert "8 tokens; " in errors[0]
    assert "exit 'kll' is not a criterion" in errors[1]
    assert "/r takes one value" in errors[2]
    assert "mean steps 2.0" in errors[3]


def test_an_interrupted_file_and_stream_keep_what_was_made(folder, tmp_path, capsys, monkeypatch):
    add, calls = writing.Text.add, []

    def interrupted(text, tokens):
        calls.append(tokens)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return add(text, tokens)

    monkeypatch.setattr(writing.Text, "add", interrupted)
    with pytest.raises(SystemExit, match="130"):
        verb.main(command(folder, "--prompt", PROMPTS[0], "--max_new_tokens", "20"))
    streamed = capsys.readouterr().out.rstrip("\n")
    calls.clear()
    with pytest.raises(SystemExit, match="130"):
        ask(folder, tmp_path, "--batch_size", "1", "--max_new_tokens", "64")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["finish_reason"] for row in rows] == ["interrupted", "length"]  # the longest prompt was first
    assert [len(row["tokens"]) for row in rows] == [33, 64]
    assert len(streamed) > 1
    assert rows[0]["text"].startswith(streamed)
    assert "holds 2 of 3 texts" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--prompt", "a", "--recurrence", "0"], "--recurrence 0 must be 1 or more"),
        (["--prompt", ""], "--prompt is empty"),
        (["--prompt", "abcd " * 40], "--prompt has 201 tokens; the model's context of 128"),
        (["--prompt", "\ud800"], "not valid Unicode"),
        (["--prompt", "a", "--exit", "kll"], "exit 'kll' is not a criterion: choose one of kl, kl-entropy"),
        (["--prompt", "a", "--min_steps", "4"], "--min_steps needs --exit NAME"),
        (["--prompt", "a", "--speculate", "4"], "--speculate N and --draft_recurrence R belong together"),
        (["--prompt", "a", "--cache.policy", "some"], "cache.policy=some must be full, mod or last"),
        (["--prompt", "a", "--cache.policy=mod", "--cache.budget", "0"], "cache.budget=0 must be positive"),
        (["--prompt", "a", "--temprature", "1"], "unknown option --temprature; did you mean --temperature?"),
        (["--prompt", "a", "--temperature", "-1"], "temperature=-1.0 must not be negative"),
        (["--prompt", "a", "--parallel.data", "64"], "--parallel.data 64 and --parallel.fsdp 1 do not fit the"),
        (["--prompt", "a", "--tokenizer_path", "/nowhere"], "--tokenizer_path /nowhere: no such folder"),
        (["--prompt", "a", "--stop", ""], "--stop '' would end every text at once"),
        (["--prompts", "/nowhere.jsonl", "--out", "x.jsonl"], "--prompts /nowhere.jsonl cannot be read"),
        (["--prompts", "/nowhere.jsonl"], "--prompts needs --out"),
        ([], "give --prompt TEXT, --prompts FILE.jsonl or --interactive"),
    ],
)
def test_a_mistake_is_one_line(folder, capsys, words, expected):
    with pytest.raises(SystemExit, match="2"):
        run_verb(lambda: verb.main([str(folder / "hf"), *words]))
    line = capsys.readouterr().err
    assert expected in line
    assert line.startswith("error: ")
    assert line.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{", "line 2: not JSON"),
        ('{"text": "a"}', 'line 2: not an object with a text under "prompt"'),
        ('{"prompt": "a", "steps": 1}', 'line 2: results use the key "steps"'),
        ('{"prompt": ""}', "line 2: the prompt is empty"),
    ],
)
def test_a_mistake_in_a_file_names_its_line(folder, tmp_path, capsys, line, expected):
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n' + line + "\n")
    words = ["--prompts", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out.jsonl")]
    with pytest.raises(SystemExit, match="2"):
        run_verb(lambda: verb.main([str(folder / "hf"), *words]))
    assert expected in capsys.readouterr().err


def test_what_does_not_fit_is_refused_with_the_numbers(folder, capsys, monkeypatch):
    monkeypatch.setattr(caches, "_free", lambda: 1000)
    with pytest.raises(SystemExit, match="2"):
        run_verb(lambda: verb.main(command(folder, "--prompt", "a")))
    assert "1 rows x 40 positions x 3 slots takes 8.19e-05 GB and 1e-06 GB are free" in capsys.readouterr().err
    larger = make_tokenizer()
    larger.add_tokens([f"<{i}>" for i in range(9)])
    larger.save_pretrained(folder / "larger")
    with pytest.raises(SystemExit, match="2"):
        run_verb(lambda: verb.main(command(folder, "--prompt", "a", "--tokenizer_path", str(folder / "larger"))))
    assert "has 269 tokens, more than the model's 264" in capsys.readouterr().err


def test_a_chat_template_makes_prompts_of_messages(folder):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    model = model_of("dense", "float32", model={"vocab_size": 264})
    writer = writing.Writer(model, tokenizer, [1], [], chat=True)
    earlier = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    tokens = writer.encode("z", "the prompt", earlier)
    assert tokens[0] == BOS
    assert tokenizer.decode(tokens[1:]) == "u:x;a:y;u:z;a:"


def test_a_stop_string_over_token_borders_and_half_a_character_are_held_back():
    pieces = ["ab", "c", "x", "st", "op!", "!"]
    text = writing.Text(lambda tokens: "".join(pieces[token] for token in tokens), ["xstop", "zz"])
    assert text.add([0, 1]) is None
    assert text.unseen() == "abc"
    assert text.add([2, 3]) is None  # the stop string has begun
    assert text.unseen() == ""
    assert text.add([4, 5]) == 1
    assert (text.text, text.unseen(last=True), text.tokens) == ("abc", "", [0, 1, 2, 3, 4])
    held = writing.Text(lambda tokens: "é\ufffd" if len(tokens) == 1 else "éü", [])
    held.add([0])
    assert held.unseen() == "é"
    held.add([1])
    assert held.unseen() == "ü"
