"""Microbenchmarks: one list of cases (``cases.py``), run by ``fastlora bench`` and by pytest.

docs/benchmarks.md has the method. Runs from a bare checkout with torch and numpy; PEFT is a peer
where it can be imported.
"""

from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
