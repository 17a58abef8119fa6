"""The page of a run, or of several: what is on it, that it needs nothing else, and that no text on it is taken for markup."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from forwardtune.config.repeat import repeat_command
from forwardtune.paper.report.course import Course
from forwardtune.run_folder import RunFolder
from forwardtune.trajectory import read_log
from support.command import Setting, cli, done, read, refused, write_jsonl, write_task

EVIL = '<script>alert(1)</script> & "quotes" {{ 7 * 7 }} it\'s'


@pytest.fixture(scope="module")
def setting(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tiny_folder, write_task(tmp_path_factory.mktemp("task")))


@pytest.fixture(scope="module")
def runs(setting: Setting, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs that found their rate, were told it, and were tuned by Adam."""
    folder = tmp_path_factory.mktemp("runs")
    done(*setting.train(folder / "found", lr="auto", eps="auto", steps=60))
    done(*setting.train(folder / "told", lr=3e-2, steps=12, eval_steps=4, seed=3))
    done(*setting.train(folder / "adam", method="adam", steps=3))
    return {name: folder / name for name in ("found", "told", "adam")}


class Page(HTMLParser):
    """What a browser would make of a page: its tags, the text between them, and the addresses that it would load."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("name", ["found", "told", "adam"])
def test_page_of_a_run(runs: dict[str, Path], name: str, tmp_path: Path) -> None:
    run = shutil.copytree(runs[name], tmp_path / name)
    assert done("report", run).out == ""
    page, metrics = Page(run / "report" / "report.html"), read(run)
    assert page.loads
    assert all(address.startswith("data:image/png;base64,") for address in page.loads)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    pictures = {path.stem for path in (run / "report").glob("*.png")}
    own = {"loss-steps", "loss-seconds", "dev-steps", "dev-seconds", "memory"}
    assert pictures == (own if name == "adam" else own | {"projected-gradient", "learning-rate", "unchanged"})
    assert len(page.loads) == len(pictures)
    for value in (metrics["before"]["loss"], metrics["test"]["loss"], metrics["test"]["macro_f1"]):
        assert f"{value:.4f}" in page.text
    for line in read(run / "predictions.jsonl"):
        assert line["input"] in page.text
    assert repeat_command(metrics["settings"]) in page.text
    assert "finished" in page.text


def test_columns_are_those_of_the_log(runs: dict[str, Path]) -> None:
    course, log = Course(RunFolder(runs["found"]), "found"), read_log(runs["found"] / "steps.jsonl")
    assert course.steps == list(range(1, 61))
    assert course.loss == [record.loss for record in log.records]
    assert course.seconds[-1] == pytest.approx(sum(record.seconds for record in log.records))
    assert course.projected[5] == pytest.approx(abs(log.records[5].coefficients[0]))
    assert course.rates[-1] == log.records[-1].lr[0]
    assert course.rollbacks == [(back.at, back.to) for back in log.rollbacks]
    assert all(0 <= share <= 1 for share in course.unchanged if not math.isnan(share))
    assert [line["step"] for line in course.measured] == [line["step"] for line in read(runs["found"] / "dev.jsonl")]


def test_the_command_does_the_run_again(runs: dict[str, Path], tmp_path: Path) -> None:
    command = shlex.split(Course(RunFolder(runs["told"]), "told").command)
    assert command[0] == "forwardtune"
    assert command[-2:] == ["--output-dir", "DIR"]
    done(*command[1:-1], tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (runs["told"] / "model.safetensors").read_bytes()


def test_several_runs_stand_beside_each_other(runs: dict[str, Path], tmp_path: Path) -> None:
    done("report", *runs.values(), "--output-dir", tmp_path / "page")
    page = Page(tmp_path / "page" / "report.html")
    for name, run in runs.items():
        assert f"{name} after" in page.text
        assert f"{read(run)['test']['loss']:.4f}" in page.text
    with refused(tmp_path, "several runs.*--output-dir") as ran:
        ran(cli("report", runs["found"], runs["told"]))


def test_what_users_and_models_wrote_is_text(runs: dict[str, Path], tmp_path: Path) -> None:
    """In inputs, answers, names of classes, settings and the folder's own name."""
    run = shutil.copytree(runs["told"], tmp_path / "a $x_1$ <b>run<\\b>")
    line = {"example": 1, "input": EVIL, "gold": EVIL, "completion": f"after {EVIL}", "right": True}
    write_jsonl(run / "predictions.jsonl", [line | {"before": {"completion": f"before {EVIL}", "right": False}}])
    write_jsonl(run / "completions.jsonl", [{"step": 1, "split": "train", "prompt": EVIL, "completion": EVIL}])
    metrics = read(run)
    metrics["settings"]["objective"] = EVIL
    metrics["by_class"]["test"]["classes"] = {EVIL: metrics["by_class"]["test"]["classes"]["0"]}
    (run / "metrics.json").write_text(json.dumps(metrics))
    done("report", run)
    page = Page(run / "report" / "report.html")
    assert not {"script", "b"} & set(page.tags)
    assert page.text.count(EVIL) >= 7
    assert run.name in page.text
    assert "49" not in re.sub(r"\d+\.\d+", "", page.text.split("Answers before")[1].split("Settings")[0])


def test_unfinished_run(runs: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    lines = (runs["told"] / "steps.jsonl").read_bytes().splitlines(keepends=True)
    (run / "steps.jsonl").write_bytes(b"".join(lines[:6]))
    done("report", run)
    page = Page(run / "report" / "report.html")
    assert re.search(r"not finished: 5 of 12 steps", page.text)
    assert (run / "report" / "loss-steps.png").read_bytes().startswith(b"\x89PNG")


def test_folder_that_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    with refused(tmp_path, "no such folder") as ran:
        ran(cli("report", tmp_path / "none"))
    with refused(tmp_path, "holds no run: give the folder that forwardtune train wrote to") as ran:
        ran(cli("report", tmp_path / "empty", tmp_path / "other", "--output-dir", tmp_path / "page"))


def test_without_plots_no_package_for_them_is_needed(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forwardtune.paper.extra.find_spec", lambda name: None)
    with refused(
        tmp_path, r"plots need matplotlib and pandas: pip install 'forwardtune\[paper\]', or add --no-plots"
    ) as ran:
        ran(cli("report", runs["told"], "--output-dir", tmp_path / "page"))
    done("report", runs["told"], "--output-dir", tmp_path / "page", "--no-plots")
    assert [path.name for path in (tmp_path / "page").iterdir()] == ["report.html"]


def test_a_browser_shows_the_page(runs: dict[str, Path], tmp_path: Path) -> None:
    """Its screenshot is neither empty nor cut: there is ink from top to bottom, and the lines' colour in the plots."""
    browser = os.environ.get("CHROMIUM") or next(
        filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome"))),
        None,
    )
    if browser is None:
        pytest.skip("no Chromium here: set CHROMIUM, or install chromium")
    from matplotlib.image import imread

    done("report", runs["found"], "--output-dir", tmp_path / "page")
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,2400", f"--screenshot={tmp_path / 'shot.png'}",
        (tmp_path / "page" / "report.html").as_uri(),
    ]  # fmt: skip
    subprocess.run(command, check=True, timeout=60, capture_output=True)
    shot = imread(tmp_path / "shot.png")[..., :3]
    assert shot.shape == (2400, 1200, 3)
    inked = (shot.min(axis=2) < 0.5).any(axis=1)
    assert inked[:200].any()
    assert inked[1500:].any()
    blue = np.abs(shot - np.array([0x00, 0x72, 0xB2]) / 255).max(axis=2) < 0.08  # the first line's
    assert blue.sum() > 200
