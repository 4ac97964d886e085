"""What the head groups of one mask take in a division: chunks that are staged, pairs, and gaps between them."""

from __future__ import annotations

from dataclasses import dataclass

from oocattn.division.base import Division
from oocattn.division.quorums import CyclicQuorums
from oocattn.planning.live import ChunkGrid, dead_gaps, kept_with_mask, keys_needed, keys_of_quorums
from oocattn.planning.plan import divide
from oocattn.problem.mask import Mask


@dataclass(frozen=True)
class Work:
    """What the head groups of one mask take, each: live pairs of a query head, subproblems, and chunks and keys staged."""

    mask: Mask
    head_groups: int
    division: Division
    pairs: int
    query_chunks: int  # staged, once for each subproblem that needs them: so many partials are handed back
    key_chunks: int
    keys: int  # staged
    query_gaps: int  # between staged rows of a chunk, and keys, which are then read apart
    key_gaps: int

    @property
    def subproblems(self) -> int:
        return len(self.division.indices)

    @property
    def keys_of_blocks(self) -> int:
        """Keys staged, once for each query chunk that meets them: about as many."""
        return self.keys * self.query_chunks // max(1, self.subproblems)


@kept_with_mask
def _numbers_of(mask: Mask, grid: ChunkGrid, decomposition: str, span: int) -> tuple[Division, int, int, int, int, int, int]:
    """The numbers of `Work`, from its division on: the same wherever partials are kept."""
    division = divide(mask, grid, decomposition, span)
    queries, chunks = division.chunk_reads()
    keys = chunks * grid.key_chunk_rows
    if not isinstance(division, CyclicQuorums):  # a strip meets one query chunk
        keys = keys_needed(mask, grid, grid.chunk_rows)[0]
    elif not division.is_regular:
        keys = keys_of_quorums(mask, grid, division)
    gaps = dead_gaps(mask, grid.start, grid.stop)  # a chunk has its share of them each time that it is staged
    of_chunks = queries * gaps[0] // grid.query_chunks, chunks * gaps[1] // grid.key_chunks
    return division, mask.pairs(range(grid.start, grid.stop)), queries, chunks, keys, *of_chunks


def work_of(mask: Mask, head_groups: int, grid: ChunkGrid, decomposition: str, span: int) -> Work:
    """The work of so many head groups of one mask, on this grid and in this division."""
    return Work(mask, head_groups, *_numbers_of(mask, grid, decomposition, span))
