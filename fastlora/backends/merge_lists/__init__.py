"""The ops that merge any number of weights in one call: all of them or none."""
