"""Requests that come and go, one forward a step for all."""
