"""The commands. Importing this package imports nothing heavy: each command loads what it needs."""

import os

# numpy is used for tables, never for linear algebra: its library's threads would only spin.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
