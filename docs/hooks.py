"""mkdocs: the repository's own pages are pages of the site too, and links between all of them hold.

README.md stays what it is for readers of the repository; on the site it is the front page.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
# Where the pages that lie outside of docs/ are on the site.
PAGES = {
    ROOT / "README.md": DOCS / "index.md",
    ROOT / "CONTRIBUTING.md": DOCS / "contributing.md",
    ROOT / "SECURITY.md": DOCS / "security.md",
    ROOT / "CHANGELOG.md": DOCS / "changelog.md",
}
# The benchmarks' reports and their pictures, of runs that are kept.
RESULTS = ROOT / "benchmarks" / "results"
for kind in ("report.md", "*.png"):
    for path in RESULTS.rglob(kind):
        if not path.parent.name.endswith(("-quick", "-shapes")):
            PAGES[path] = DOCS / "measured" / path.relative_to(RESULTS)
LINK = re.compile(r"\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    for source, page in PAGES.items():
        name = page.relative_to(DOCS).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(source)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    here = Path(page.file.abs_src_path).parent
    there = (DOCS / page.file.src_uri).parent

    def link(match: re.Match[str]) -> str:
        text, target, anchor = match[1], here / match[2], match[3] or ""
        if not target.exists():
            return match[0]  # another host's, or wrong: mkdocs says so
        target = PAGES.get(target.resolve(), target.resolve())
        if DOCS not in target.parents:
            return text  # a file that is no page
        return f"[{text}]({Path(os.path.relpath(target, there)).as_posix()}{anchor})"

    return LINK.sub(link, markdown)
