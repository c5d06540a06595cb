"""What engines.py puts into MuJoCo's and MJX's own places acts in our calls and goes with them; mjx is not needed."""

from __future__ import annotations

import sys
import threading
from enum import Enum
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from torchrl_pmoe.envs.mujoco import engines

Geom = Enum("Geom", ["PLANE", "CAPSULE", "BOX"])
PAIR = (Geom.PLANE, Geom.CAPSULE)
UPRIGHT = SimpleNamespace(geom_xmat=np.array([np.eye(3), [[1, 0, 0], [0, 0.8, 0.6], [0, -0.6, 0.8]]]))


def collide(model, data, key, geom):
    """MJX's answer for one pair, with fixed axes ``[2, 3, 3]``."""
    return np.zeros(2), np.zeros((2, 3)), np.tile(np.array([[0.0, 0, 1], [1, 0, 0], [0, 1, 0]]), (2, 1, 1))


collide.ncon = 2


@pytest.fixture
def table(monkeypatch):
    """MJX's private table, in modules that stand in for MJX."""
    driver = ModuleType("mujoco.mjx._src.collision_driver")
    driver._COLLISION_FUNC = {PAIR: collide, (Geom.PLANE, Geom.BOX): len}
    package, source = ModuleType("mujoco.mjx"), ModuleType("mujoco.mjx._src")
    source.collision_driver = driver
    for module in (package, source, driver):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(engines, "import_mjx", lambda: (SimpleNamespace(numpy=np), package))
    return driver._COLLISION_FUNC


def axes(table):
    """The first friction axis of a capsule that leans along y."""
    return table[PAIR](None, UPRIGHT, None, np.array([[0, 1]]))[2][0, 1]


def test_frames_are_mujocos_within_our_calls_alone(table):
    with engines._mujocos_contact_frames():
        assert axes(table) == pytest.approx([0, 1, 0])
        assert table[PAIR].ncon == 2
    assert table[PAIR] is collide


def test_another_threads_call_meanwhile_is_mjxs_own(table):
    found = []
    with engines._mujocos_contact_frames():
        other = threading.Thread(target=lambda: found.append(axes(table)))
        other.start()
        other.join()
    assert found[0] == pytest.approx([1, 0, 0])


def test_threads_that_trace_at_the_same_time_do_not_take_it_from_each_other(table):
    inside, leave = threading.Event(), threading.Event()

    def trace():
        with engines._mujocos_contact_frames():
            inside.set()
            leave.wait(600)

    other = threading.Thread(target=trace)
    other.start()
    assert inside.wait(600)
    with engines._mujocos_contact_frames():
        leave.set()
        other.join()
        assert axes(table) == pytest.approx([0, 1, 0])
    assert table[PAIR] is collide


def test_an_error_while_tracing_leaves_nothing_behind(table):
    with pytest.raises(RuntimeError), engines._mujocos_contact_frames():
        raise RuntimeError
    assert table[PAIR] is collide


def test_warnings_of_mujoco_still_reach_the_users_own_handler():
    mujoco = pytest.importorskip("mujoco")
    before, heard = mujoco.get_mju_user_warning(), []
    mujoco.set_mju_user_warning(heard.append)
    try:
        with engines.quiet_mujoco():
            show = mujoco.get_mju_user_warning()
            show("compiler attribute 'settotalmass' is deprecated")
            show("nan in qacc")
        assert heard == ["nan in qacc"]
    finally:
        mujoco.set_mju_user_warning(before)
