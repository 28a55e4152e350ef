"""Checks of arguments: each error names the argument, its value and what was expected."""
