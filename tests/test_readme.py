"""The examples of the README, as a reader would paste them one after the other."""

from __future__ import annotations

import re
from pathlib import Path


def test_examples_run_and_train_the_router():
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert len(examples) == 2
    names: dict[str, object] = {}
    for example in examples:
        exec(example, names)
        assert all(parameter.grad.norm() > 0 for parameter in names["actor"].router_parameters())
