from __future__ import annotations

import pytest
import torch

NO_CUDA = not torch.cuda.is_available()


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
