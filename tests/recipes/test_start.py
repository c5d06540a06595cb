"""A command that Python starts anew, as a user's is; other tests fork theirs.

sac_pmoe is started so in test_sac_recipe.py and test_control.py. The others import what this one imports:
test_layout.py knows that no import depends on the order of others.
"""

from __future__ import annotations

from recipe_runs import assert_one_line, start


def test_python_starts_a_recipe(tmp_path):
    done = start("target_reaching", "seed=-1", directory=tmp_path, anew=True)
    assert_one_line(done, "seed=-1: must be an integer >= 0")
    assert list(tmp_path.iterdir()) == []
