"""Who each row belongs to, followed from a model's entry through every op to its layers.

owners.py: an owner an element, kept small. marks.py: whose the elements of living tensors are.
rules.py (computing), moving.py (moving elements): what an op makes of its operands' owners.
tracing.py: the mode that sees the ops. entry.py: where a batch comes in; what is reused of a trace.
statements.py: what the caller states. known_models.py: models whose inputs name the rows by content.
"""
