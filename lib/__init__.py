"""Helpers behind the five notebooks: one noun a module; the notebooks are the only place where modules meet."""

import logging
import os
import warnings

# OpenMP reads both once, when torch is loaded. Its threads wait for each other asleep: beside other work on the same
# cores a spinning thread keeps the one that it waits for from running, and a run takes ten times as long. The short
# spin before the sleep keeps an idle machine as fast as before (benchmarks/bench_busy.py).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

# Two lines that would stand red in every filled notebook and say nothing about the run: JupyterLab's progress widgets
# are not installed on purpose, and bitsandbytes' optional CPU kernel is not needed where weights are kept dense.
warnings.filterwarnings("ignore", message="IProgress not found")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

__version__ = "0.1.0"
