"""Imprint: a test-time-adaptation inference server. Holds the version and nothing slow."""

__all__ = ["__version__"]

__version__ = "0.1.0"
