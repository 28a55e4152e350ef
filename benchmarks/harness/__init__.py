"""How it is measured: gate, clock, ceilings, processes, lines of results."""
