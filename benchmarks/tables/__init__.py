"""Commands of their own, whose tables the docs show: whole processes and whole models."""
