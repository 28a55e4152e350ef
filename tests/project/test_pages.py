"""The Python code of the user pages runs in order, and their links exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [*(ROOT / "docs").rglob("*.md"), *(ROOT / f"{n}.md" for n in ("README", "CONTRIBUTING"))]
)
# Pages whose code runs, the packages that it needs and what it leaves behind.
RUN = {
    "README.md": (["transformers"], "my-adapter"),
    "docs/quickstart.md": (["transformers", "peft"], "native-adapter"),
    "docs/serving.md": (["transformers"], "tenants/alice"),
    "docs/streaming.md": (["transformers"], "tenants/alice"),
}


@pytest.mark.parametrize("name", RUN)
def test_python_blocks_of_page_run_in_order(name, tmp_path, monkeypatch):
    packages, left_behind = RUN[name]
    for package in packages:
        pytest.importorskip(package)
    text = (ROOT / name).read_text("utf-8")
    blocks = [*re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)]
    assert len(blocks) >= 3
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for block in blocks:
        # As many lines as there are above it: a traceback names the page's own line.
        above = "\n" * text.count("\n", 0, block.start(1))
        exec(compile(above + block[1], name, "exec"), namespace)
    assert (tmp_path / left_behind / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_linked_file_exists(page):
    # Code in fences and backticks holds brackets of its own.
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text("utf-8"), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)#\s]+)", prose)
    here = [link for link in links if not re.match(r"https?://", link)]
    assert [link for link in here if not (page.parent / link).exists()] == []


def test_link_pattern_finds_links_between_pages():
    found = {page.name for page in PAGES if re.search(r"\]\([^)]+\.md", page.read_text("utf-8"))}
    assert {"README.md", "merging.md", "index.md"} <= found


def test_support_page_has_no_long_table_cells():
    lines = (ROOT / "docs" / "support.md").read_text("utf-8").splitlines()
    cells = [cell.strip() for line in lines if line.startswith("|") for cell in line.split("|")]
    assert cells
    assert [cell for cell in cells if len(cell) > 120] == []
