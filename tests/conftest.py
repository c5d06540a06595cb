from __future__ import annotations

import pytest
import torch

NO_CUDA = not torch.cuda.is_available()


LONGEST_FIRST = (
    "test_control.py",
    "test_compiled_training.py",
    "test_fuzz.py",
    "test_resume.py",
    "test_endings.py",
    "test_target_reaching_recipe.py",
    "test_owner.py",
    "test_sweep_kills.py",
    "test_speed_benchmarks.py",
)
"""Files whose tests take longest: begun at the end, one of them would keep one core busy while the other has none."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(autouse=True)
def _same_draws_every_run():
    torch.manual_seed(0)


@pytest.fixture(
    params=[
        "cpu",
        pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(NO_CUDA, reason="no CUDA device")]),
    ]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)
