"""What README and docs show can be done: examples run, commands are understood, links lead somewhere."""

from __future__ import annotations

import importlib
import re
import shlex
from contextlib import suppress
from functools import cache
from unittest.mock import patch

import gymnasium
import pytest
from docs_pages import PAGES, README, ROOT, TEXTS, blocks, commands, slugs
from hydra import compose, initialize_config_dir

from torchrl_pmoe.distributions import ESTIMATORS

RECIPES = ROOT / "recipes"
LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"")


@pytest.mark.parametrize("page", [name for name, text in TEXTS.items() if blocks(text, "python")])
def test_examples_of_a_page_run_one_after_the_other(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(RECIPES))
    names: dict[str, object] = {"__name__": "example"}
    # what a page adds to a table is taken out again
    with patch.dict(ESTIMATORS), patch.dict(gymnasium.registry):
        for example in blocks(TEXTS[page], "python"):
            exec(compile(example.replace("4096", "8"), f"{page}.md", "exec"), names)
            if "actor" in names and re.search(r"\.backward\(\)|train_step\(", example):
                assert all(parameter.grad.norm() > 0 for parameter in names["actor"].router_parameters())


@pytest.mark.parametrize("page", [name for name, text in TEXTS.items() if commands(text)])
def test_commands_of_a_page_have_keys_that_the_recipe_has(page, monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    for command in commands(TEXTS[page]):
        words = shlex.split(command, comments=True)
        script = next(index for index, word in enumerate(words) if word.startswith("recipes/"))
        path, arguments = ROOT / words[script], words[script + 1 :]
        assert path.is_file(), command
        options = [word for word in arguments if word.startswith("--")]
        code = path.read_text(encoding="utf-8")
        assert all(option.replace("--no-", "--") in code or option == "--help" for option in options), command
        if path.parent == RECIPES and (RECIPES / "config" / f"{path.stem}.yaml").is_file():
            keys = [word.partition("=")[0] for word in arguments if "=" in word]
            assert all(has_key(path.stem, key) for key in keys), command


@cache
def keys_of(recipe):
    """The config of a recipe, with its defaults."""
    with suppress(ModuleNotFoundError):
        importlib.import_module(f"config.{recipe}")  # registers the keys
    with initialize_config_dir(str(RECIPES / "config"), version_base="1.3"):
        return compose(recipe)


def has_key(recipe, key):
    """Whether ``key=value`` may stand in a command; ``+`` adds an entry to a group that is open."""
    name = key.removeprefix("+")
    node = keys_of(recipe)
    *groups, last = name.split(".")
    for group in groups:
        if group not in node:
            return name.startswith("hydra.")
        node = node[group]
    return last in node or (key != name and groups == ["env_kwargs"])


def test_a_key_that_no_recipe_has_is_found(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    assert has_key("sac_pmoe", "optim.lr")
    assert not any(
        has_key("sac_pmoe", key) for key in ("optim.learning_rate", "optimizer.lr", "+optim.x", "env_kwargs.x")
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_links_lead_to_files_and_headings(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for link in (first or second for first, second in LINK.findall(text)):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = page if not file else (page.parent / file).resolve()
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in slugs(target.read_text(encoding="utf-8")), f"{page.name}: {link}"


def test_the_front_page_is_short_and_its_moving_picture_light():
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert any(line.startswith("python3 -m venv") for line in lines[:50])
    assert (ROOT / "docs" / "images" / "routes.gif").stat().st_size < 1.5e6


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in PAGES[1:]:
        assert f": {page.name}\n" in navigation, page.name
