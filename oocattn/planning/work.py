"""What the head groups of one mask take in a division: chunks that are staged, pairs, and gaps between them."""

from __future__ import annotations

from dataclasses import dataclass

from oocattn.division.base import Division
from oocattn.division.quorums import CyclicQuorums
from oocattn.planning.live import ChunkGrid, dead_gaps, kept_with_mask, keys_needed, keys_of_quorums, shapes_of_documents
from oocattn.planning.measured import DOCUMENT_ROWS, TRIANGLE_ROWS
from oocattn.planning.plan import divide
from oocattn.problem.mask import Mask
from oocattn.problem.problem import Problem
from oocattn.units import ceil_div


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


def edge_calls(work: Work, problem: Problem, query_chunks: int) -> int:
    """Library calls on a CPU for documents, and at the ends of the keys of rows, where these move: halved triangles.

    A window has two ends, whose equal parts are joined into half as many calls.
    """
    mask = work.mask
    moves = mask.causal or mask.right is not None or mask.left is not None
    documents = calls_apart(work, problem)
    documents += shapes_of_documents(mask, DOCUMENT_ROWS) - 1 if mask.documents > 1 else 0
    pieces = 2 * ceil_div(problem.out_rows, TRIANGLE_ROWS) + query_chunks + documents
    return pieces if moves else documents


def calls_apart(work: Work, problem: Problem) -> int:
    """Calls for a document's keys on both sides of a gap: joined, these would not be at their distances."""
    apart = problem.given.alibi_slopes is not None and (work.mask.sinks or work.mask.prefix)
    return work.key_gaps if apart else 0
