"""The commands. Importing this package imports nothing heavy: each command loads what it needs."""

import gc
import os

# numpy is used for tables, never for linear algebra: its library's threads would only spin.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Modules and tables are many objects that stay; to look through them at the usual pace took a command of half
# a second a tenth of its time.
gc.set_threshold(100_000)
