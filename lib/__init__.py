"""Helpers behind the five notebooks: one noun a module; the notebooks are the only place where modules meet."""

__version__ = "0.1.0"
