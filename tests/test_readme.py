"""The example of the README, as a reader would paste it."""

from __future__ import annotations

import re
from pathlib import Path


def test_example_runs_and_trains_the_router():
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    example = re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1]
    names: dict[str, object] = {}
    exec(example, names)
    assert all(parameter.grad.norm() > 0 for parameter in names["actor"].router_parameters())
