"""Sets what torch's CUDA reads only once, so before torch is imported; a person's own settings stay."""

import os

# Blocks that grow: dense weights otherwise find no room where packed ones, of other sizes, have been.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
# Without it cuBLAS may add in another order in the next run, and torch refuses to train deterministically.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
