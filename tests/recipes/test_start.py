"""Commands that Python starts anew, as a user's are; other tests fork theirs. For sac_pmoe: test_sac_recipe.py."""

from __future__ import annotations

import pytest
from recipe_runs import assert_one_line, start


@pytest.mark.parametrize("recipe", ["ppo_pmoe", "dac", "target_reaching"])
def test_python_starts_a_recipe(recipe, tmp_path):
    assert_one_line(start(recipe, "seed=-1", directory=tmp_path, anew=True), "seed=-1: must be an integer >= 0")
    assert list(tmp_path.iterdir()) == []
