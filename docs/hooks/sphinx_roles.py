"""Docstrings name things as Sphinx does, ``:class:`~torchrl_pmoe.PMOEActor```; here they become links or code."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|attr|data|mod|obj|exc):`(~?)([\w.]+)`")


def _shown(role: re.Match[str]) -> str:
    short, name = role.groups()
    text = name.rpartition(".")[2] if short else name
    return f'<autoref optional identifier="{name}"><code>{text}</code></autoref>'


class SphinxRoles(griffe.Extension):
    """Replace the roles in every docstring that is read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Of one object."""
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(_shown, obj.docstring.value)
