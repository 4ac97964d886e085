"""What was measured once, and the cost of a plan takes as given: seconds and rates besides those of a `Machine`."""

from __future__ import annotations

PIN_RATE = 10e9  # bytes per second at which host memory is pinned (15e9 with huge pages)
HALF_RATE_KEYS = 512  # keys of a call at which a GPU's kernel falls to half its rate, for its launch
LAUNCH_SECONDS = 0.0002  # a call of few keys on a GPU, for the thread that launches: 0.1 to 0.3 ms
BETWEEN_SECONDS = 0.005  # in which a GPU computes nothing between two subproblems: 4 to 6 ms, of 20 to 90 each

# Seconds for which lanes on GPUs hold Python's lock, or wait for it, where several share a process (two H200, 32 cores).
# Runs of 4,096 calls and 8,192 reads took 10.6 and 14.8 s. Those of 48 partials, of two tiles each, took 0.3 to 0.5 s longer
# than computing and the disk, those of 8 partials, of four tiles each, 0.05 s.
LOCKED_CALL_SECONDS = 0.001  # a call of a kernel
LOCKED_READ_SECONDS = 0.001  # a read
LOCKED_TILE_SECONDS = 0.0035  # a query tile of a partial, which is brought back, merged and, in its chunk, divided

# What Python takes for small work on a CPU, of one core's time (Zen 4; a kernel call on 31 rows and 341 keys).
CALL_SECONDS = 0.00055  # a library call within the kernel: 0.5 to 0.7 ms
TRIANGLE_ROWS = 512  # a diagonal is halved down to these rows
PARTIAL_SECONDS = 0.00045  # a partial, besides its calls: tiles, state, merge
PARTIAL_FILE_SECONDS = 0.001  # a partial on disk, besides its bytes and its sync: written, checked, merged, removed
READ_SECONDS = 0.000125  # a chunk of an array, or each part of one between dead rows, besides its bytes
DOCUMENT_ROWS = 1024  # documents of one shape within so many rows, or more, are one library call

# What bytes take of the cores while a CPU computes (Zen 4, 2 cores that others used, too). A run that read 134 MB and wrote
# nothing took 0.06 to 0.08 s of a core beside its kernel, one that read 201 MB and wrote 68 MB 0.29 to 0.36 s.
CORE_READ_RATE = 2e9  # bytes per second of a core: read, and looked through for NaN and Inf
CORE_WRITE_RATE = 0.4e9  # the same: merged, divided, given checksums, written

RUN_SECONDS = 0.04  # any run: lanes are opened and closed, the dataset is checked, the result is committed
REREAD_FILE_SECONDS = 0.0002  # cost to open, check and remove a small file: 0.2 ms on ext4
RUN_FILES = 9  # durable files of any run: metadata, checksums, report, and what else the commit takes

TASK_SHARE = 0.5
"""Share of the cost of tasks that adds to computing on a CPU: 1 / cores at least, 1 at most, as the system divides them."""
