"""`oocattn bench`: ceilings of this machine, and ways to attend compared."""

from oocattn.bench.comparison import bench
from oocattn.bench.records import Ceiling, Progress, Row, Table

__all__ = ["Ceiling", "Progress", "Row", "Table", "bench"]
