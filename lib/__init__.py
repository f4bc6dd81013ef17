"""Helpers behind the five notebooks: one noun a module; the notebooks are the only place where modules meet."""

import logging
import warnings

# Two lines that would stand red in every filled notebook and say nothing about the run: JupyterLab's progress widgets
# are not installed on purpose, and bitsandbytes' optional CPU kernel is not needed where weights are kept dense.
warnings.filterwarnings("ignore", message="IProgress not found")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

__version__ = "0.1.0"
