"""Cells as tasks of Ray and as jobs of submitit's local executor; the recipe trains nothing."""

from __future__ import annotations

import os

import pytest
from test_sweep import STUB, half_done, make, rows_of, starts, wait_for

import sweep  # isort: skip
from parts import engines  # isort: skip
from parts.cells import Failure  # isort: skip
from parts.errors import UsageError  # isort: skip


def go_through(engine, made, received=()):
    rows = rows_of(made)
    display = sweep.Display(rows, disable=True)
    sweep.run(engine, rows, display, received)
    return rows


class Stopping(list):
    """Signals that arrive when a condition holds."""

    def __init__(self, condition):
        super().__init__()
        self._condition = condition

    def __len__(self):
        if super().__len__() == 0 and self._condition():
            self.append(15)
        return super().__len__()


@pytest.fixture(scope="module")
def ray_cluster():
    """A head without cores, so that every task is on a node that a test may remove."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    yield cluster
    cluster.shutdown()


@pytest.fixture
def on_ray(ray_cluster):
    engine = engines.OnRay(retry=False, address=ray_cluster.address)
    yield engine
    engine.close()


def test_ray_runs_cells_ends_them_with_checkpoints_and_survives_the_loss_of_a_node(ray_cluster, on_ray, tmp_path):
    hold = tmp_path / "go"
    made = [make(tmp_path, 0), make(tmp_path, 1, "fail=a bad day")]
    first = ray_cluster.add_node(num_cpus=2)
    assert [row.state for row in go_through(on_ray, made)] == ["finished", "failed"]
    assert [len(starts(cell)) for cell in made] == [1, 1]

    held = [make(tmp_path, seed, f"hold={hold}") for seed in (2, 3)]
    rows = go_through(on_ray, held, Stopping(lambda: all(map(half_done, held))))
    assert [(row.state, row.failure) for row in rows] == [("resumable", None)] * 2

    class Lose(list):
        """No signal; but once both cells run again, their node goes and another one comes."""

        lost = False

        def __len__(self):
            if not self.lost and all(len(starts(cell)) == 2 for cell in held):
                self.lost = True
                ray_cluster.remove_node(first, allow_graceful=False)
                ray_cluster.add_node(num_cpus=2)
                hold.touch()
            return 0

    assert [row.state for row in go_through(on_ray, held, Lose())] == ["finished"] * 2


def test_a_wrong_address_of_ray_is_one_line():
    pytest.importorskip("ray")
    with pytest.raises(UsageError, match=r"^ray.address=127.0.0.1:1: must be that of a Ray that runs") as error:
        engines.OnRay(retry=False, address="127.0.0.1:1")
    assert "\n" not in str(error.value)


def test_jobs_of_submitit_run_cells_and_end_them_with_checkpoints(tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PYTHONPATH", str(STUB.parent))
    hold = tmp_path / "go"
    engine = engines.OnSlurm(retry=False, folder=tmp_path / ".slurm", cluster="local", timeout_min=60)
    assert os.environ["PYTHONPATH"].split(os.pathsep) == [str(engines.RECIPES), str(STUB.parent)]
    made = [make(tmp_path, 0), make(tmp_path, 1, "fail=a bad day")]
    rows = go_through(engine, made)
    assert [(row.state, row.failure) for row in rows] == [("finished", None), ("failed", Failure("a bad day", 1))]
    held = [make(tmp_path, seed, f"hold={hold}") for seed in (2, 3)]
    go_through(engine, held, Stopping(lambda: all(map(half_done, held))))
    # submitit's own stand-in for Slurm does not wait for the processes that it has told to end
    wait_for(lambda: [sweep.look(cell).state for cell in held] == ["resumable"] * 2)
    hold.touch()
    assert [row.state for row in go_through(engine, held)] == ["finished"] * 2
    assert [len(starts(cell)) for cell in held] == [2, 2]


def test_slurm_that_is_not_there_is_one_line(tmp_path):
    pytest.importorskip("submitit")
    with pytest.raises(UsageError, match=r"^engine=slurm: must be local or ray where there is no Slurm") as error:
        engines.OnSlurm(retry=False, folder=tmp_path, cluster="slurm")
    assert "\n" not in str(error.value)
