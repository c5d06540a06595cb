"""Files of the repository that lie outside of ``docs/`` and that a page links to become files of the site.

A page writes ``../recipes/results/theorem.png``, which works where the repository is browsed. The site keeps the
path without the leading ``../``.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_LINK = re.compile(r"(?<=\]\()\.\./((?:\.\./)*[^)#\s]+)")
_RESULTS = "recipes/benchmarks/RESULTS.md"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what is linked, and the page of measurements that lies beside the benchmarks."""
    root = Path(config.config_file_path).parent
    linked = {_RESULTS: _RESULTS}
    for page in files.documentation_pages():
        linked.update(dict.fromkeys(_LINK.findall(page.content_string), page.src_uri))
    text = (root / _RESULTS).read_text(encoding="utf-8")
    linked.update({f"recipes/{path}": _RESULTS for path in _LINK.findall(text)})
    for path, page in linked.items():
        if not (root / path).is_file():
            raise PluginError(f"{page} links to {path}, which is no file of the repository")
        files.append(File.generated(config, path, abs_src_path=str(root / path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Take the leading ``../`` from links that leave ``docs/``."""
    return markdown if page.file.src_uri == _RESULTS else _LINK.sub(r"\1", markdown)
