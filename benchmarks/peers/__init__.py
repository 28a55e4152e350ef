"""Peers of fastlora: other libraries, imported where installed, and the compiler."""
