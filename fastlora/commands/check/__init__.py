"""``fastlora check``: the ops against formulas in float64."""
