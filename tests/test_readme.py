"""The examples of the README, as a reader would paste them one after the other."""

from __future__ import annotations

import re
from pathlib import Path


def test_examples_run_and_train_the_router():
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert len(examples) == 3
    names: dict[str, object] = {}
    for example in examples[:2]:
        exec(example, names)
        assert all(parameter.grad.norm() > 0 for parameter in names["actor"].router_parameters())
    exec(examples[2].replace("4096", "8"), names)
    assert names["rollout"].shape == (8, 100)
    assert names["env"].reset(seed=0)[0].shape == (4,)
    assert names["env"].render().shape[-1] == 3
