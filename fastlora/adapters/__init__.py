"""Adapters as files and tensors, apart from any model."""
