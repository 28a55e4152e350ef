"""Rows: which adapter each belongs to, followed from the model through every op to its layers.

watch.py: where a batch comes into a model, with hooks.py; inputs.py: which inputs are the batch;
image_rows.py: models whose images belong to rows by the tokens that stand for them. frame.py,
outer_frame.py: one forward; eager_stance.py keeps compiled code from running meanwhile. tracing.py:
the mode that sees the ops; marks.py: owners of living tensors; owners.py: an owner an element, kept
small; rules/: what an op makes of its operands' owners. verdicts.py: forwards that need not be
followed again, by signature.py and repeatable.py. statements.py: what the caller states.
"""
