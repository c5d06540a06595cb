"""What README and docs show can be done: examples run, commands are understood, links lead somewhere."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from contextlib import ExitStack
from functools import cache
from unittest.mock import patch

import gymnasium
import pytest
import torch
from docs_pages import PAGES, README, ROOT, TEXTS, blocks, commands, slugs
from hydra import compose, initialize_config_dir

from torchrl_pmoe.distributions import ESTIMATORS
from torchrl_pmoe.runs import RunDirectory, load_policy, read_metrics

sys.path.insert(0, str(ROOT / "recipes"))
import sac_pmoe
from config.sweep import read_command, table
from parts.launch import read
from parts.networks import POLICIES

RECIPES = ROOT / "recipes"
LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"")


def train(directory, policy="pmoe"):
    """A training of a few frames, as the pages have one before they load its policy."""
    with initialize_config_dir(str(RECIPES / "config"), version_base="1.3"):
        overrides = [f"policy={policy}", "total_frames=8", "collector.init_random_frames=4", "optim.batch_size=4"]
        overrides += ["network.hidden_sizes=[8]", "logger.eval_episodes=1", "logger.eval_max_steps=5", "device=cpu"]
        composed = compose("sac_pmoe", ["env=Pendulum-v1", "logger.progress_bar=false", *overrides])
    cfg = read(composed, sac_pmoe.SACConfig)
    sac_pmoe.resolve(cfg)
    sac_pmoe.train(cfg, directory)


@pytest.mark.parametrize("page", [name for name, text in TEXTS.items() if blocks(text, "python")])
def test_examples_of_a_page_run_one_after_the_other(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    if page == "export":
        pytest.importorskip("onnxruntime")
    if page in ("deploy", "export"):
        train(tmp_path / "runs" / "pendulum")
    names: dict[str, object] = {"__name__": "example"}
    # what a page adds to a table is taken out again
    tables = (ESTIMATORS, POLICIES, gymnasium.registry)
    with ExitStack() as stack:
        for table in tables:
            stack.enter_context(patch.dict(table))
        stack.enter_context(patch.object(sys, "path", [*sys.path]))
        for example in blocks(TEXTS[page], "python"):
            exec(compile(example.replace("4096", "8"), f"{page}.md", "exec"), names)
            if "actor" in names and re.search(r"\.backward\(\)|train_step\(", example):
                assert all(parameter.grad.norm() > 0 for parameter in names["actor"].router_parameters())
        if page == "script":
            run = RunDirectory(tmp_path / "run")
            for frames in (4, 8):  # the second one goes on from the first one's checkpoint
                with run.own():
                    names["train"](run, frames, interval=4)
            assert read_metrics(tmp_path / "run" / "metrics.csv")["frames"].tolist() == [4, 8]
            assert load_policy(tmp_path / "run").checkpoint.name == "checkpoint-000000000008"
        if page == "extend":
            train(tmp_path / "run")
            loaded = load_policy(tmp_path / "run")
            assert any(isinstance(module, torch.nn.LayerNorm) for module in loaded.modules())


@pytest.mark.parametrize("page", [name for name, text in TEXTS.items() if commands(text)])
def test_commands_of_a_page_have_keys_that_the_recipe_has(page):
    for command in commands(TEXTS[page]):
        words = shlex.split(command, comments=True)
        script = next(index for index, word in enumerate(words) if word.startswith("recipes/"))
        path, arguments = ROOT / words[script], words[script + 1 :]
        assert path.is_file(), command
        options = [word for word in arguments if word.startswith("--")]
        code = path.read_text(encoding="utf-8")
        assert all(option.replace("--no-", "--") in code or option == "--help" for option in options), command
        if path.stem == "sweep" and not options:
            cfg, overrides = read_command(arguments)
            assert table(cfg.recipe, overrides), command
        elif path.parent == RECIPES and (RECIPES / "config" / f"{path.stem}.yaml").is_file():
            keys = [word.partition("=")[0] for word in arguments if "=" in word]
            assert all(has_key(path.stem, key) for key in keys), command


@cache
def keys_of(recipe):
    """The config of a recipe, with its defaults."""
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


def test_a_key_that_no_recipe_has_is_found():
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


@pytest.mark.parametrize("package", ["distributions", "modules", "objectives", "baselines", "envs", "trainers", "runs"])
def test_every_public_name_is_on_the_page_of_the_api(package):
    shown = re.findall(r"^::: (\S+)$", TEXTS["api"], re.MULTILINE)
    public = importlib.import_module(f"torchrl_pmoe.{package}")
    functions_and_classes = [name for name in public.__all__ if callable(getattr(public, name))]
    assert not [name for name in functions_and_classes if f"torchrl_pmoe.{package}.{name}" not in shown]
