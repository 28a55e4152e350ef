"""Suites of cases: each has operands, providers, right results and a cost."""
