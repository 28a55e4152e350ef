"""Measuring: gate, clock, ceilings, processes, lines of results."""
