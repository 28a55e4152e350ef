"""Rules: what an op that has run makes of the owners of its operands."""
