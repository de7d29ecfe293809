"""The report: one page of a run's records and scores, made without JAX, that nothing in its input can break."""

import base64
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jax_huginn.config.checks import UserError
from jax_huginn.report import report
from jax_huginn.reporting.record import METRICS
from jax_huginn.visualization.charts import Axis, Bars, HeatMap, Lines, Series
from jax_huginn.visualization.paper import write_plots
from jax_huginn.visualization.run_charts import DRAWN_OTHERWISE, PANELS
from jax_huginn.visualization.thinning import averaged, extremes, running_mean

ROOT = Path(__file__).parent.parent


def make_run(folder: Path, steps: int = 40, **fields: Any) -> Path:
    """A run folder with records as training writes them, and a checkpoint's digest."""
    (folder / "checkpoints/40").mkdir(parents=True)
    (folder / "checkpoints/40/checksums.json").write_text(folder.name)
    config = {"run_dir": str(folder), "moe": {"experts": 4, "active": 2}, "recurrence": {"mean": 4}, "train": fields}
    (folder / "config.json").write_text(json.dumps(config))
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            record = {"step": step, "loss": 9.0 if step == 33 else 5 / step, "grad_norm": 1.0, "n": step % 7, "k": 3.0}
            if step % 10 == 0:
                record |= {"expert_counts": [step, 2, 3, 4], "rel_residual": 0.1, "val_loss_r1": 5.0, "val_loss_r4": 4}
                record |= {"tokens_per_second": 100.0, "skipped_updates": 0, "val_accuracy_r4_by_group": [0.5, 0.1]}
                record |= {"val_groups": [2, 5], "val_group_labels": [100, 25], "val_accuracy_r4": 0.42}
            file.write(json.dumps(record) + "\n")
    return folder


def make_results(file: Path, run: Path, **changes: Any) -> Path:
    one = {
        "alias": "task",
        "acc,none": 0.5,
        "acc_stderr,none": 0.02,
        "bits_per_byte,none": 1.5,
        "bits_stderr,none": "N/A",
    }
    content = {
        "source": str(run / "checkpoints/40"),
        "weights_sha256": hashlib.sha256(hashlib.sha256(run.name.encode()).digest()).hexdigest(),
        "results": {"1": {"task": one}, "4": {"task": one | {"acc,none": 0.75}}, "kl": {"task": one}},
        "executed_steps": {"1": 1, "4": 4, "kl": {"task": {"used": 2.5, "computed": 3.5}}},
    }
    file.write_text(json.dumps(content | changes))
    return file


def figures_of(page: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found
    return json.loads(found[1])


def numbers(array: Any) -> list[float]:
    """plotly writes arrays as base64."""
    return np.frombuffer(base64.b64decode(array["bdata"]), array["dtype"]).tolist()


def test_one_command_makes_a_page_without_jax(tmp_path):
    """Broken lines are counted and named, on the page and on the console; nothing is loaded from elsewhere."""
    run = make_run(tmp_path / "moe")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "loss": 1.0, "grad_norm": "nan", "future_metric": 1}\n{"step": 42, "lo\n[1]\n{}\n')
    results = make_results(tmp_path / "results.json", run)
    code = "import sys; from jax_huginn.report import main; main(); sys.exit('jax' in sys.modules)"
    command = [sys.executable, "-c", code, str(run), "--eval", str(results)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    page = (run / "report.html").read_text()
    for text in (done.stderr, page):
        assert "3 broken lines left out (line 42, 43, 44)" in text
        assert "unknown metrics left out: future_metric" in text
    outside = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"(src|href)\s*=\s*[\"']?(http|//)|@import|url\(", outside)
    figures = figures_of(run / "report.html")
    assert {"loss", "learning_rate"} & set(figures) == {"loss"}  # a metric that is not there has no chart
    assert {"val_loss_by_depth", "sampled_depths", "expert_load", "score_acc", "score_acc_executed"} <= set(figures)
    accuracy = figures["accuracy_by_group"]["data"][0]
    assert numbers(accuracy["x"]) == [2, 5]
    assert numbers(accuracy["error_y"]["array"]) == pytest.approx([0.05, 0.06])
    load = figures["expert_load"]["data"][0]
    assert len(load["customdata"]) == 4
    assert "1.290 x an equal share<br>32.26 %" not in str(load["customdata"][0][0])  # 10 of 19
    assert "2.105 x an equal share<br>52.63 %" in load["customdata"][0][0]
    score = figures["score_acc"]["data"][0]
    assert "0.75 ± 0.02" in score["text"][1]


def test_an_exit_criterion_is_drawn_at_the_steps_used_and_computed(tmp_path):
    run = make_run(tmp_path / "moe")
    out = tmp_path / "page.html"
    report([run], [make_results(tmp_path / "results.json", run)], [], out, None)
    names = {trace["name"]: trace["text"] for trace in figures_of(out)["score_acc_executed"]["data"]}
    assert set(names) == {"task", "task · exit, steps used", "task · exit, steps computed"}
    assert "used 2.50, computed 3.50" in names["task · exit, steps used"][0]


def test_figures_for_papers_show_what_the_page_shows(tmp_path):
    """A chart of every kind; a dollar in a name is no formula, and a name is text in the SVG."""
    x = np.array([1.0, 2.0, 4.0])
    curve = Series("a $ run", x, 3 / x, "#0072b2", error=x / 10)
    charts = [
        Lines("lines", "Lines", Axis("r", log=True, ticks=[1, 2, 4]), Axis("loss"), [curve], [(2.0, "a mark")]),
        Bars("bars", "Bars", Axis("n"), Axis("%"), [("", x, x, "#0072b2")], [(2.0, "mean")]),
        HeatMap("map", "Map", Axis("step"), Axis("expert"), [1.0, 2], ["0", "1"], np.eye(2), "load", 0.0, 2.0),
    ]
    assert write_plots(charts, tmp_path) == 3
    for chart, shown in zip(charts, ("a $ run", "mean", "expert"), strict=True):
        assert shown in (tmp_path / f"{chart.key}.svg").read_text()
        assert (tmp_path / f"{chart.key}.png").read_bytes().startswith(b"\x89PNG")


def test_results_of_one_model_in_several_files_share_a_curve(tmp_path):
    """Depths and criteria come from separate calls. The same score twice, as by the twin, has a curve of its own."""
    run = make_run(tmp_path / "moe")
    one = {"task": {"acc,none": 0.5}}
    results = [{"1": one}, {"4": one, "kl": one}, {"1": one}]
    files = [make_results(tmp_path / f"{i}.json", run, results=each) for i, each in enumerate(results)]
    report([run], files, [], tmp_path / "page.html", None)
    curves = {trace["name"]: numbers(trace["x"]) for trace in figures_of(tmp_path / "page.html")["score_acc"]["data"]}
    assert curves == {"task · moe step 40": [1, 4], "task · moe step 40'": [1]}


def test_several_runs_share_charts_and_their_differences_are_listed(tmp_path):
    runs = [make_run(tmp_path / "a", steps=200, seed=1), make_run(tmp_path / "b<i>", seed=2)]
    out = tmp_path / "page.html"
    report(runs, [], [], out, None)
    assert [trace["name"] for trace in figures_of(out)["loss"]["data"] if trace["showlegend"]] == ["a", "b&lt;i&gt;"]
    page = out.read_text()
    assert "<td>train.seed</td><td>1</td><td>2</td>" in page
    assert "b<i>" not in page.split("<script>")[0]


def test_a_long_run_keeps_its_spikes_in_few_points(tmp_path):
    run = make_run(tmp_path / "long", steps=20_000)
    report([run], [], [], None, None)
    figures = figures_of(run / "report.html")
    assert (run / "report.html").stat().st_size < 8e6
    assert "at most 2,000 points" in (run / "report.html").read_text()
    assert len(figures["expert_load"]["data"][0]["customdata"][0]) == 300
    y = np.random.default_rng(0).standard_normal(30_001)
    y[[777, 20_000]] = 50, np.nan
    kept = extremes(y)
    assert len(kept) <= 2000
    assert {0, 777, 30_000, int(np.nanargmin(y))} <= set(kept.tolist())


def test_means_are_those_of_the_plain_formula():
    y = np.array([1.0, 2, np.nan, 4, 9])
    assert np.allclose(running_mean(y, 3), [1.5, 1.5, 3, 6.5, 6.5])
    assert averaged(np.arange(12.0).reshape(6, 2), 3).tolist() == [[1, 2], [5, 6], [9, 10]]


def test_every_metric_is_drawn_or_has_a_reason_not_to_be():
    drawn = [name for panel in PANELS for name in panel.metrics]
    assert sorted(drawn + list(DRAWN_OTHERWISE)) == sorted(metric.name for metric in METRICS)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run, file: (run / "metrics.jsonl").unlink(), "moe has no records yet"),
        (lambda run, file: [(run / name).unlink() for name in ("metrics.jsonl", "config.json")], "not a run folder"),
        (lambda run, file: (run / "metrics.jsonl").write_text(""), "none of the 0 lines"),
        (lambda run, file: (run / "metrics.jsonl").write_text('{"loss": 1}\n"step"\n'), "none of the 2 lines"),
        (lambda run, file: file.write_text("no json"), "it is not JSON"),
        (lambda run, file: file.write_text("[1]"), "not a results file of `evaluate --output`: it has no 'results'"),
        (lambda run, file: make_results(file, run, results={"1": {}}), "holds no score"),
        (lambda run, file: make_results(file, run, weights_sha256="0" * 64), "of other weights .* --baseline"),
        (lambda run, file: make_results(file, run, weights_sha256="0", source="other"), "of other weights"),
        (lambda run, file: file.unlink(), "results.json cannot be read: No such file"),
    ],
)
def test_bad_input_is_one_line(tmp_path, spoil, message):
    run = make_run(tmp_path / "moe")
    results = make_results(tmp_path / "results.json", run)
    spoil(run, results)
    with pytest.raises(UserError, match=message) as caught:
        report([run], [results], [], tmp_path / "page.html", None)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "page.html").exists()


def test_other_models_are_baselines_and_a_deleted_checkpoint_is_noted(tmp_path):
    run, other = make_run(tmp_path / "moe"), make_run(tmp_path / "other")
    baseline = make_results(tmp_path / "baseline.json", other)
    gone = make_results(tmp_path / "gone.json", run, source=str(run / "checkpoints/30"), weights_sha256="1")
    report([run], [gone], [baseline], tmp_path / "page.html", None)
    names = [trace["name"] for trace in figures_of(tmp_path / "page.html")["score_acc"]["data"]]
    assert names == ["task · moe step 30", "task · other step 40"]
    assert "is gone, so its weights were not compared" in (tmp_path / "page.html").read_text()
