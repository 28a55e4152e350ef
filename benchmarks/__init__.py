"""Microbenchmarks: one list of cases (``cases.py``), run by ``python -m benchmarks`` and by pytest.

docs/benchmarks.md has the method. Runs from a bare checkout with torch and numpy; PEFT is a peer
where it can be imported.
"""
