"""The engine: requests join and leave a running batch, one forward a step for all of them."""
