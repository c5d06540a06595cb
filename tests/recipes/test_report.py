"""What a report says of a sweep, against the same statistics written as loops."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from test_plot import write_run

import report  # isort: skip
from parts import intervals  # isort: skip
from parts.cells import PLAN  # isort: skip

RNG = np.random.default_rng(0)
TASKS = {
    "Hopper-v4": (RNG.normal(100, 20, 7), RNG.normal(80, 20, 6)),
    "Ant-v4": (RNG.normal(5, 1, 5), RNG.normal(5, 2, 5)),
}
POLICIES = ("pmoe", "gaussian")
FRAMES = (100, 200, 400)


def middle_half(values) -> float:
    """With a quarter cut off at each end; SciPy rounds the number to cut down."""
    cut = len(values) // 4
    return float(np.mean(sorted(values)[cut : len(values) - cut]))


def wins(x, y) -> float:
    return float(np.mean([1.0 if a > b else 0.5 if a == b else 0.0 for a in x for b in y]))


def resampled(statistic, samples, repeats=2000):
    """The ends of a percentile bootstrap in which every sample is drawn by itself."""
    rng = np.random.default_rng(1)
    found = [statistic([rng.choice(one, len(one)) for one in samples]) for _ in range(repeats)]
    return np.percentile(found, [2.5, 97.5])


def curve(last: float) -> tuple[float, float, float]:
    return 0.0, last / 2, last


@pytest.fixture
def sweep(tmp_path):
    for task, both in TASKS.items():
        for policy, values in zip(POLICIES, both, strict=True):
            for seed, value in enumerate(values):
                cell = tmp_path / f"env={task}_policy={policy}_seed={seed}"
                write_run(cell, curve(value), FRAMES, env=task, policy=policy, seed=seed, total_frames=400)
                (cell / PLAN).write_text(json.dumps({"recipe": "sac_pmoe", "total_frames": 400}))
                (cell / "finished").write_text("400\n")
    return tmp_path


def lines_of(directory) -> dict[tuple[str, str, str], dict[str, str]]:
    with (directory / "report.csv").open(newline="") as file:
        return {(row["task"], row["runs"], row["statistic"]): row for row in csv.DictReader(file)}


def test_every_number_is_that_of_a_loop(sweep, tmp_path, capsys):
    output = tmp_path / "report"
    assert report.main([str(sweep), "--output", str(output)]) == 0
    found = lines_of(output)
    last, area, better = (
        "last return, interquartile mean",
        "area under the curve, interquartile mean",
        "last return, probability of improvement",
    )
    for task, both in TASKS.items():
        for policy, values in zip(POLICIES, both, strict=True):
            rounded = [float(f"{value}") for value in values]
            row = found[task, f"policy={policy}", last]
            assert (row["seeds"], row["missing"], row["frames"]) == (str(len(values)), "0", "400")
            assert float(row["value"]) == pytest.approx(middle_half(rounded), rel=1e-4)
            low, high = resampled(lambda one: middle_half(one[0]), [rounded])
            assert float(row["low"]) == pytest.approx(low, abs=0.1 * np.std(values) + 1e-6)
            assert float(row["high"]) == pytest.approx(high, abs=0.1 * np.std(values) + 1e-6)
            # two trapezoids: (0 + v/2)/2 * 100 + (v/2 + v)/2 * 200, over a width of 300
            areas = [(25 * value + 150 * value) / 300 for value in values]
            assert float(found[task, f"policy={policy}", area]["value"]) == pytest.approx(middle_half(areas), rel=1e-4)
        row = found[task, "policy=gaussian > policy=pmoe", better]
        assert float(row["value"]) == pytest.approx(wins(both[1], both[0]), rel=1e-4)
    scaled = {
        task: [(np.array(one) - min(map(min, both))) / (max(map(max, both)) - min(map(min, both))) for one in both]
        for task, both in TASKS.items()
    }
    for place, policy in enumerate(POLICIES):
        tasks = [both[place] for both in scaled.values()]
        row = found[report.ALL_TASKS, f"policy={policy}", last]
        assert float(row["value"]) == pytest.approx(middle_half(np.concatenate(tasks)), rel=1e-4)
        low, high = resampled(lambda drawn: middle_half(np.concatenate(drawn)), tasks)
        assert (float(row["low"]), float(row["high"])) == (pytest.approx(low, abs=0.03), pytest.approx(high, abs=0.03))
    row = found[report.ALL_TASKS, "policy=gaussian > policy=pmoe", better]
    expected = np.mean([wins(both[1], both[0]) for both in scaled.values()])
    assert float(row["value"]) == pytest.approx(expected, rel=1e-4)
    for picture in ("curves.png", "profiles.png", "intervals.png"):
        assert (output / picture).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    printed = capsys.readouterr().out
    assert (output / "report.md").read_text() in printed
    assert "No seed is missing." in printed


def test_a_profile_is_the_part_of_the_runs_above_a_level():
    tasks = [np.round(RNG.uniform(size=30), 1), np.round(RNG.uniform(size=40) ** 2, 1)]
    levels = [0.0, 0.5, 0.95]
    found = intervals.performance_profile(tasks, levels)
    everything = np.concatenate(tasks)
    np.testing.assert_allclose(found.value, [np.mean([score > level for score in everything]) for level in levels])
    for place, level in enumerate(levels):
        low, high = resampled(lambda drawn, level=level: np.mean(np.concatenate(drawn) > level), tasks)
        assert (found.low[place], found.high[place]) == (pytest.approx(low, abs=0.03), pytest.approx(high, abs=0.03))


def test_the_seeds_of_a_task_are_drawn_from_that_task():
    """Two tasks far apart: a bootstrap that mixed them would have a wide interval."""
    apart = [np.array([0.0, 0.01, 0.02, 0.03]), np.array([1.0, 1.01, 1.02, 1.03])]
    found = intervals.interquartile_mean_over_tasks(apart)
    assert found.high - found.low < 0.03
    wins_here = [(apart[1], apart[0]), (apart[0], apart[1])]
    assert tuple(map(float, intervals.probability_of_improvement_over_tasks(wins_here))) == (0.5, 0.5, 0.5)


def test_what_is_missing_is_counted_and_left_out(sweep, tmp_path, capsys):
    pmoe = [sweep / f"env=Ant-v4_policy=pmoe_seed={seed}" for seed in range(5)]
    (pmoe[0] / "finished").unlink()  # its end did not come
    write_run(pmoe[1], curve(1e9)[:2], FRAMES[:2], env="Ant-v4", policy="pmoe", seed=1, total_frames=400)
    for name in ("metrics.csv", "config.yaml", "finished"):
        (pmoe[2] / name).unlink()
    plan = {"recipe": "sac_pmoe", "env": "Ant-v4", "policy": "pmoe", "seed": 2, "optim": {"lr": 1e-3}}
    (pmoe[2] / PLAN).write_text(json.dumps({**plan, "total_frames": 400}))
    assert report.main([str(sweep), "--output", str(tmp_path / "report")]) == 0
    row = lines_of(tmp_path / "report")["Ant-v4", "policy=pmoe", "last return, interquartile mean"]
    assert (row["seeds"], row["missing"]) == ("2", "3")
    assert float(row["value"]) == pytest.approx(np.mean(TASKS["Ant-v4"][0][3:]), rel=1e-4)
    printed = capsys.readouterr().out
    assert "3 seeds are missing:" in printed
    seeds = "seed 0 (400 of 400 frames), seed 1 (200 of 400 frames), seed 2 (0 of 400 frames)"
    assert f"- Ant-v4, policy=pmoe: {seeds}" in printed


def test_runs_without_a_sweep_are_compared_by_their_frames(tmp_path):
    for seed in range(3):
        write_run(tmp_path / f"{seed}", (1.0, 2.0), (100, 200), seed=seed)
    write_run(tmp_path / "short", (1.0,), (100,), seed=3)
    (kind,) = report.read([tmp_path])["Hopper-v4"].values()
    assert (len(kind.runs), kind.missing) == (3, ["seed 3 (100 of 0 frames)"])


def test_one_seed_has_a_value_and_no_interval(tmp_path, capsys):
    write_run(tmp_path, (1.0, 12.5))
    assert report.main([str(tmp_path), "--output", str(tmp_path / "report")]) == 0
    assert "| 1 |  | 200 | 12.5 |" in capsys.readouterr().out


@pytest.mark.parametrize("plan", [False, True])
def test_nothing_to_report_is_one_line(plan, tmp_path, capsys):
    if plan:
        (tmp_path / "cell").mkdir()
        (tmp_path / "cell" / PLAN).write_text(json.dumps({"recipe": "sac_pmoe", "env": "Ant-v4", "total_frames": 4}))
    assert report.main([str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path}: must be a ")
