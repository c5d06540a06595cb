"""What the tests of several recipes share."""

from __future__ import annotations

import runpy
import signal
import sys
import warnings

import pytest
from recipe_runs import RECIPES

from parts import launch as launching  # isort: skip
from parts import process  # isort: skip


@pytest.fixture
def launch(monkeypatch, tmp_path, capfd):
    """A recipe as its command starts it, but in this process: its exit status and the lines on stderr."""
    handlers = {number: signal.getsignal(number) for number in process.endings()}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launching, "sweep", launching.Sweep())
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")

    def run(recipe, *args):
        script = str(RECIPES / f"{recipe}.py")
        monkeypatch.setattr(sys, "argv", [script, *args])
        try:
            runpy.run_path(script, run_name="__main__")
            status = 0
        except SystemExit as end:
            status = end.code
        return status, capfd.readouterr().err.splitlines()

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)
