"""Runs are compared as a user does it: one command over their directories."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import recipe_runs  # noqa: F401  (puts the recipes on the path)
import yaml

import plot  # isort: skip


def write_run(directory: Path, returns, frames=(100, 200), **config) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    values = {"recipe": "sac_pmoe", "env": "Hopper-v4", "policy": "pmoe", "seed": 0, "optim": {"lr": 1e-3}, **config}
    (directory / "config.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    with (directory / "metrics.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["frames", "return_mean", "return_std"])
        writer.writerows([frame, value, 1.0] for frame, value in zip(frames, returns, strict=True))


@pytest.fixture
def runs(tmp_path) -> Path:
    for seed, last in enumerate((10.0, 20.0, 60.0)):
        write_run(tmp_path / f"pmoe-{seed}", (1.0, last), seed=seed)
    write_run(tmp_path / "gaussian", (2.0, 5.0), policy="gaussian")
    write_run(tmp_path / "slow", (3.0, 7.0), env="Ant-v4", optim={"lr": 1e-4})
    return tmp_path


def test_seeds_share_a_line_and_tasks_have_a_panel_each(runs):
    found = plot.kinds(plot.find_runs([runs]))
    assert {env: {label: len(same) for label, same in here.items()} for env, here in found.items()} == {
        "Hopper-v4": {"policy=gaussian, optim.lr=0.001": 1, "policy=pmoe, optim.lr=0.001": 3},
        "Ant-v4": {"policy=pmoe, optim.lr=0.0001": 1},
    }


def test_the_table_has_the_mean_over_seeds_within_its_interval(runs, tmp_path, capsys):
    picture = tmp_path / "picture.png"
    assert plot.main([str(runs), "--output", str(picture)]) == 0
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "| 3 |" in line)
    mean, low, high = (
        float(part) for part in line.split("|")[5].replace("[", "").replace("]", "").replace(",", "").split()
    )
    assert (mean, low, high) == (30.0, pytest.approx(10, abs=5), pytest.approx(60, abs=14))
    assert low < mean < high


def test_frames_that_not_all_seeds_have_are_left_out(tmp_path):
    write_run(tmp_path / "a", (1.0, 2.0, 3.0), frames=(100, 200, 300))
    write_run(tmp_path / "b", (3.0, 6.0), frames=(100, 200), seed=1)
    frames, mean = plot.over_seeds(plot.find_runs([tmp_path]))
    assert frames.tolist() == [100, 200]
    np.testing.assert_allclose(mean.value, [2.0, 4.0])


def test_agents_of_one_run_are_its_seeds(tmp_path):
    write_run(tmp_path, (1.0, 2.0), recipe="sac_many_seeds")
    (tmp_path / "seed0").mkdir()
    (tmp_path / "metrics.csv").rename(tmp_path / "seed0" / "metrics.csv")
    (run,) = plot.find_runs([tmp_path])
    assert run.config["recipe"] == "sac_many_seeds"


def test_what_is_no_run_is_told_in_one_line(tmp_path, capsys):
    assert plot.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path}: must be a run, or a directory with runs that have been evaluated\n"
    )


def test_forty_kinds_of_runs_fit_into_the_legend(tmp_path):
    for index in range(40):
        write_run(tmp_path / str(index), (1.0, float(index)), num_experts=index + 1)
    made = []
    subplots = plot.subplots
    plot.subplots = lambda *args, **kwargs: made.append(subplots(*args, **kwargs)) or made[-1]
    try:
        plot.draw(plot.kinds(plot.find_runs([tmp_path])), tmp_path / "picture.png")
    finally:
        plot.subplots = subplots
    figure = made[0][0]
    box, page = figure.legends[0].get_window_extent(), figure.bbox
    assert page.x0 <= box.x0 < box.x1 <= page.x1
    assert page.y0 <= box.y0 < box.y1 <= page.y1
