"""Who each row belongs to, followed from a model's entry through every op to its layers.

owners.py: an owner an element, kept small. marks.py: whose the elements of living tensors are.
What an op (op.py) makes of its operands' owners: rules.py, moving.py, indexing.py; computing.py is
their table. tracing.py: the mode that sees the ops. entry.py: where a batch comes into a model;
frame.py, opened.py: one forward; signature.py, repeatable.py: what is found again without following
it; eagerly.py: compiled code kept from running. statements.py: what the caller states.
known_models.py: models whose inputs name their rows by what is in them.
"""
