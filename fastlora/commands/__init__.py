"""The command line: ``fastlora ...``."""
