"""The ops in plain torch."""
