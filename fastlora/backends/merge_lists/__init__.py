"""Merging any number of weights in one call: all of them or none."""
