"""The report on run folders that were written by hand: every number was worked out with pencil and paper."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from forwardtune.cli import main
from forwardtune.errors import InputError
from forwardtune.paper.report import collect, write_report
from forwardtune.paper.sweep import Run, Sweep, SweepFolder

MIB = 2**20
NONE = "\N{EN DASH}"
TIMES = "\N{MULTIPLICATION SIGN}"


class Made:
    """A sweep's folder, made by hand."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runs: list[Run] = []

    def run(self, method: str, task: str, seed: int, lr: float | None = None, model: str = "m", **options: Any) -> Path:
        """Plan a run; the folder that it would write to."""
        point = {} if lr is None else {"lr": lr}
        name = f"{model}/{task}/{method}/{lr}/seed-{seed}"
        self.runs.append(Run(name, "train", model, task, method, seed, point, {**options, **point}))
        return self.folder / name

    def finished(self, *run: Any, test: float, dev: float | None, loss: float = 0.5, **metrics: Any) -> Path:
        """Plan a run and write what it measured."""
        folder = self.run(*run)
        metric = "f1" if run[1] == "squad" else "accuracy"
        content = {"metric": metric, "test": {metric: test, "loss": 0.1, "examples": 200}, **metrics}
        if dev is not None:
            content["dev"] = {metric: dev, "loss": loss}
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps(content))
        return folder

    def failed(self, *run: Any, reason: str) -> None:
        folder = self.run(*run)
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.with_name(f"{folder.name}.failed").write_text(reason + "\n")

    def plan(self) -> Sweep:
        """Write sweep.json."""
        names = [list(dict.fromkeys(getattr(run, key) for run in self.runs)) for key in ("model", "task", "method")]
        metrics = {task: "f1" if task == "squad" else "accuracy" for task in names[1]}
        sweep = Sweep("by hand", names[0], names[1], metrics, names[2], False, self.runs)
        self.folder.mkdir(parents=True, exist_ok=True)
        SweepFolder(self.folder).write_plan(sweep)
        return sweep


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return Made(tmp_path / "sweep")


def write_history(folder: Path, losses: list[float], seconds: float, dev: dict[int, float]) -> None:
    lines: list[dict[str, Any]] = [
        {"step": i, "seconds": i * seconds, "loss": loss} for i, loss in enumerate(losses, start=1)
    ]
    lines += [{"step": i, "seconds": i * seconds, "dev": {"accuracy": score, "loss": 1.0}} for i, score in dev.items()]
    (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def full(made: Made) -> Made:
    """Two tasks, three methods, two seeds, in all states."""
    memory = {"peak_memory_bytes": 110 * MIB, "inference_peak_memory_bytes": 100 * MIB, "seconds": 30.0, "steps": 20}
    made.finished("Zero-shot", "sst2", 0, test=0.5, dev=None, peak_memory_bytes=2000 * MIB)
    # Seed 0: the first rate is better on the test split, the second on the development split: the second it is.
    made.finished("MeZO", "sst2", 0, 1e-5, test=0.9, dev=0.6, **memory)
    made.finished("MeZO", "sst2", 0, 3e-5, test=0.7, dev=0.8, **memory)
    # Seed 1: equal accuracy, the lower loss decides.
    made.finished("MeZO", "sst2", 1, 1e-5, test=0.8, dev=0.7, loss=0.4, **memory)
    made.finished("MeZO", "sst2", 1, 3e-5, test=0.1, dev=0.7, loss=0.5, **memory)
    made.finished("Adam", "sst2", 0, test=0.95, dev=0.9, seconds=4.0, steps=10, peak_memory_bytes=400 * MIB)
    made.finished("Zero-shot", "squad", 0, test=0.25, dev=None)
    made.finished("MeZO", "squad", 0, 1e-5, test=0.4, dev=0.4, **memory)
    made.failed("MeZO", "squad", 0, 3e-5, reason="the loss was not finite")
    made.run("MeZO", "squad", 1, 1e-5)
    made.run("MeZO", "squad", 1, 3e-5)
    made.failed("Adam", "squad", 0, reason="out of memory: lower --batch-size")
    return made


def rows(text: str, title: str) -> dict[str, list[str]]:
    """The rows of the table below a heading."""
    section = text.split(f"# {title}\n")[1].split("\n#")[0]
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in cells[2:]}


def test_the_tables(made: Made, tmp_path: Path) -> None:
    full(made).plan()
    paths = write_report(made.folder, tmp_path / "out", plots=False)
    assert [path.name for path in paths] == ["results.md", "results.json"]
    text = paths[0].read_text()
    assert rows(text, "Test scores") == {
        "Zero-shot": ["50.0", "25.0", "37.5"],
        "MeZO": ["75.0 ± 7.1", "40.0", NONE],  # 70 and 80: 5 sqrt(2) apart from their mean; no average of a part
        "Adam": ["95.0", NONE, NONE],
    }
    assert rows(text, "Chosen on the development split") == {"MeZO": ["3e-5, 1e-5", "1e-5"]}
    assert rows(text, "Peak memory, MiB") == {
        "Zero-shot": ["2,000", NONE],
        "MeZO": [f"110 (1.10{TIMES})", f"110 (1.10{TIMES})"],
        "Adam": ["400", NONE],
    }
    assert rows(text, "Seconds per step") == {"MeZO": ["1.5", "1.5"], "Adam": ["0.4", NONE]}
    assert "accuracy (sst2); f1 (squad)" in text
    assert "Test examples: 200." in text
    assert "Steps: 20 (MeZO); 10 (Adam)." in text
    assert "Seeds: 0 (Zero-shot, Adam); 0, 1 (MeZO)." in text
    assert "- MeZO, squad: 2 of 4 runs are not finished (lr 1e-5, seed 1; lr 3e-5, seed 1)." in text
    assert "- MeZO, squad: 1 failed (lr 3e-5, seed 0): the loss was not finite" in text
    assert "- Adam, squad: 1 failed (seed 0): out of memory: lower --batch-size" in text


def test_the_json_has_the_numbers_of_the_tables(made: Made, tmp_path: Path) -> None:
    full(made).plan()
    content = json.loads(write_report(made.folder, tmp_path, plots=False)[1].read_text())
    (model,) = content["models"]
    assert model["tasks"] == [{"task": "sst2", "metric": "accuracy"}, {"task": "squad", "metric": "f1"}]
    zero_shot, mezo, adam = model["methods"]
    assert zero_shot["average"] == 37.5
    assert (mezo["average"], adam["average"]) == (None, None)
    cell = mezo["cells"]["sst2"]
    assert cell["mean"] == pytest.approx(75)
    assert cell["std"] == pytest.approx(5 * math.sqrt(2))
    assert cell["seconds_per_step"] == 1.5
    assert cell["memory_ratio"] == 1.1
    assert [(each["seed"], each["point"], each["test"]) for each in cell["chosen"]] == [
        (0, {"lr": 3e-5}, pytest.approx(70)),
        (1, {"lr": 1e-5}, pytest.approx(80)),
    ]
    assert [each["reason"] for each in adam["cells"]["squad"]["failed"]] == ["out of memory: lower --batch-size"]
    assert len(mezo["cells"]["squad"]["unfinished"]) == 2


def test_a_run_that_diverged_is_never_chosen(made: Made) -> None:
    made.finished("MeZO", "sst2", 0, 1e-3, test=0.9, dev=math.nan, loss=math.nan)
    made.finished("MeZO", "sst2", 0, 1e-4, test=0.8, dev=0.5, loss=math.nan)
    made.finished("MeZO", "sst2", 0, 1e-5, test=0.7, dev=0.5, loss=9.0)
    (chosen,) = collect(made.folder, made.plan(), "m").cells["MeZO", "sst2"].chosen
    assert chosen.run.point == {"lr": 1e-5}


def test_each_model_has_its_tables(made: Made, tmp_path: Path) -> None:
    """A failed point of the grid does not take the average."""
    made.finished("MeZO", "sst2", 0, 1e-5, "one", test=0.7, dev=0.7)
    made.failed("MeZO", "sst2", 0, 1e-3, "one", reason="the loss was not finite")
    made.finished("MeZO", "sst2", 0, None, "two", test=0.6, dev=0.7)
    made.plan()
    text = write_report(made.folder, tmp_path, plots=False)[0].read_text()
    first, second = text.split("\n## two\n")
    assert "1 failed (lr 1e-3, seed 0): the loss was not finite" in first
    assert "60.0" not in first
    assert rows(first, "Test scores") == {"MeZO": ["70.0", "70.0"]}
    assert rows(second, "Test scores") == {"MeZO": ["60.0", "60.0"]}


def test_a_curve_is_the_mean_over_seeds_at_steps_that_all_have() -> None:
    pytest.importorskip("pandas")
    from forwardtune.paper.report.plots import mean_curve

    one = [{"step": 1, "seconds": 2.0, "loss": 4.0}, {"step": 2, "seconds": 4.0, "loss": 2.0}]
    two = [
        {"step": 1, "seconds": 4.0, "loss": 2.0},
        {"step": 1, "seconds": 4.0, "dev": {}},
        {"step": 2, "seconds": 8.0, "loss": math.nan},
        {"step": 3, "seconds": 12.0, "loss": 1.0},
    ]
    curve = mean_curve([one, two], lambda record: record.get("loss"))
    assert (list(curve.index), list(curve["seconds"]), list(curve["mean"])) == ([1], [3.0], [3.0])
    assert list(curve["std"]) == pytest.approx([math.sqrt(2)])
    curve = mean_curve([one], lambda record: record.get("loss"))
    assert (list(curve.index), list(curve["seconds"]), list(curve["mean"])) == ([1, 2], [2.0, 4.0], [4.0, 2.0])
    assert curve["std"].isna().all()
    assert mean_curve([one, []], lambda record: record.get("loss")).empty
    assert mean_curve([two], lambda record: None).empty
    # Smoothing is the mean of the last values of each seed, as many as the share of the run says.
    for values, share, smoothed in (([4.0, 2.0, 6.0, 1.0], 0.5, [4.0, 3.0, 4.0, 3.5]), ([4.0, 2.0], 0.01, [4.0, 2.0])):
        history = [{"step": i, "loss": value} for i, value in enumerate(values)]
        assert list(mean_curve([history], lambda record: record["loss"], share)["mean"]) == smoothed


def test_the_plots_show_what_the_runs_recorded(made: Made, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from forwardtune.paper.report.plots import _dev, _loss, _memory

    for seed, loss in ((0, 2.0), (1, 4.0)):
        folder = made.finished("MeZO", "sst2", seed, test=0.7, dev=0.7, peak_memory_bytes=300 * MIB)
        write_history(folder, [loss] * 10, 2.0, {5: 0.5 + 0.1 * seed, 10: 0.7})
    made.finished("Zero-shot", "sst2", 0, test=0.4, dev=0.45, peak_memory_bytes=100 * MIB)
    sweep = made.plan()
    results = collect(made.folder, sweep, "m")

    figure = _loss(results, "seconds")
    assert figure is not None
    (line,) = figure.axes[0].lines
    assert list(line.get_xdata()) == [2.0 * step for step in range(1, 11)]
    assert list(line.get_ydata()) == [3.0] * 10
    assert "smoothed" in figure.get_supylabel()

    figure = _dev(results, "steps")
    assert figure is not None
    line, level = figure.axes[0].lines
    assert list(line.get_xdata()) == [5, 10]
    assert list(line.get_ydata()) == pytest.approx([55, 70])
    (band,) = figure.axes[0].collections  # 50 and 60 at step 5: 5 sqrt(2) on each side; no spread at step 10
    assert sorted({round(y, 3) for _, y in band.get_paths()[0].vertices}) == [47.929, 62.071, 70.0]
    assert set(level.get_ydata()) == {45.0}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["MeZO", "Zero-shot"]

    figure = _memory(results)
    assert figure is not None
    assert [bar.get_width() for bar in figure.axes[0].patches] == [300, 100]

    paths = write_report(made.folder, tmp_path)
    assert [path.name for path in paths[2:]] == [
        "loss-steps.png", "loss-seconds.png", "dev-steps.png", "dev-seconds.png", "memory.png",
    ]  # fmt: skip
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths[2:])
    assert all(f"({path.name})" in paths[0].read_text() for path in paths[2:])


@pytest.mark.parametrize("tasks", [1, 2, 7])
def test_nothing_overlaps(made: Made, tasks: int) -> None:
    """Legend, axis labels and panels, as drawn, keep clear of each other, and nothing is cut off."""
    pytest.importorskip("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from forwardtune.paper.report.plots import _dev

    for method in (f"method number {i}" for i in range(9)):
        for task in (f"task{i}" for i in range(tasks)):
            folder = made.finished(method, task, 0, test=0.7, dev=0.7)
            write_history(folder, [1.0] * 9, 2.0, {3: 0.51, 9: 0.7})
    figure = _dev(collect(made.folder, made.plan(), "m"), "steps")
    assert figure is not None
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    panels = [axes.get_tightbbox(renderer) for axes in figure.axes if axes.get_visible()]
    assert len(panels) == tasks
    boxes = [*panels, figure.legends[0].get_window_extent(renderer)]
    boxes += [text.get_window_extent(renderer) for text in (figure._supxlabel, figure._supylabel)]
    for i, box in enumerate(boxes):
        assert figure.bbox.x0 <= box.x0 + 1
        assert box.x1 <= figure.bbox.x1 + 1
        assert figure.bbox.y0 <= box.y0 + 1
        assert box.y1 <= figure.bbox.y1 + 1
        assert not any(box.overlaps(other) for other in boxes[:i])


def test_a_sweep_that_has_just_begun_has_a_report_without_plots(made: Made, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    made.run("MeZO", "sst2", 0, 1e-5)
    made.plan()
    paths = write_report(made.folder, tmp_path)
    assert [path.name for path in paths] == ["results.md", "results.json"]
    assert rows(paths[0].read_text(), "Test scores") == {"MeZO": [NONE, NONE]}


def test_wrong_input_has_a_remedy(made: Made, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    with pytest.raises(InputError, match="make one with forwardtune sweep"):
        write_report(tmp_path, tmp_path, plots=False)
    assert main(["report", str(tmp_path / "none")]) == 2
    assert "there is no such folder" in capsys.readouterr().err
    made.run("MeZO", "sst2", 0)
    made.plan()
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # to import it raises ModuleNotFoundError
    monkeypatch.delitem(sys.modules, "forwardtune.paper.report.plots", raising=False)
    for name in [name for name in sys.modules if name.startswith("matplotlib.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(InputError, match=r"plots need matplotlib: pip install 'forwardtune\[paper\]'"):
        write_report(made.folder, tmp_path)
    assert main(["report", str(made.folder)]) == 2
    assert "pip install 'forwardtune[paper]', or add --no-plots" in capsys.readouterr().err
    assert not (tmp_path / "results.md").exists()
    write_report(made.folder, tmp_path, plots=False)
