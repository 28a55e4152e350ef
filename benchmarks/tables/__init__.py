"""Commands that print tables of the docs: whole processes and whole models."""
