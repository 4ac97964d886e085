"""`oocattn bench`: this machine's ceilings, and one problem computed by oocattn and by what else computes it here."""

from oocattn.bench.comparison import bench
from oocattn.bench.records import Ceiling, Progress, Row, Table

__all__ = ["Ceiling", "Progress", "Row", "Table", "bench"]
