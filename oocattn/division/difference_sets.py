"""Difference sets and covers: the k residues modulo c that make every quorum.

A set S of residues is a *difference cover* modulo c when every residue is a difference of two of its elements, and a
perfect *difference set* (lambda = 1, c = k(k-1)+1) when every non-zero one is so exactly once. Chunk
pairs and owners are in `quorums.py`.

Perfect sets exist for c = q^2+q+1, k = q+1, with q a prime power (Singer, "A theorem in finite projective geometry and
some applications to number theory", Trans. AMS 43, 1938). Let s(i+3) = a s(i+2) + b s(i+1) + d s(i) be a linear
recurrence over GF(q) whose characteristic polynomial is primitive: the positions of its zeros within c terms are the
exponents of a plane of GF(q^3) over GF(q), and so a Singer set. We try recurrences in a fixed order and check the
zeros themselves, so that nothing rests on a test for primitive polynomials.

Any other c gets a cover from a ruler that measures every length up to c/2 (Wichmann, "A note on restricted difference
bases", J. London Math. Soc. 38, 1963; used so by Colbourn and Ling, "Quorums from difference covers", Information
Processing Letters 75, 2000). It has k < sqrt(1.5 c) + 2 elements; below c = 64 that is within one of the counting bound
c <= k(k-1)+1.
"""

from __future__ import annotations

from itertools import accumulate, count, product
from math import isqrt

import numpy as np

from oocattn.units import ceil_div


def difference_cover(modulus: int) -> tuple[int, ...]:
    """The difference cover of `modulus`: perfect where a Singer set exists.

    It is ascending and contains 0. Of all its translates and mirror images it is the one with the smallest gaps on
    both sides of 0 (`quorums.py` says what that saves), then the lexicographically smallest. Always the same for the
    same modulus. Raises ValueError for a modulus below 1.
    """
    if modulus < 1:
        raise ValueError(f"modulus {modulus}: expected at least 1")
    if modulus in (1, 3):
        return tuple(range(modulus // 2 + 1))
    order = perfect_order(modulus)
    residues = _ruler_cover(modulus) if order is None else _singer_set(order)
    placed = [sorted(sign * (x - origin) % modulus for x in residues) for origin in residues for sign in (1, -1)]
    best = min(placed, key=lambda cover: (modulus - cover[-1] + cover[1], cover))
    return tuple(best)


def perfect_order(modulus: int) -> int | None:
    """q (0, 1, a prime power) where modulus = q^2+q+1 has a perfect set; else None."""
    order = (isqrt(4 * modulus - 3) - 1) // 2
    if order * order + order + 1 != modulus:
        return None
    prime, degree = _prime_and_degree(order) if order > 1 else (order, 1)
    return order if prime**degree == order else None


def _prime_and_degree(order: int) -> tuple[int, int]:
    """The least prime factor p of order >= 2, and the least m with p^m >= order."""
    prime = next(d for d in range(2, order + 1) if order % d == 0)
    return prime, next(m for m in count(1) if prime**m >= order)


def _singer_set(order: int) -> list[int]:
    """Zeros of the first recurrence over GF(order) that are a perfect set."""
    add, multiply = _field(order)
    modulus = order * order + order + 1
    # Without an s(i+2) term (tried first) the zeros hold 0, 1 and 3, the two smallest gaps side by side.
    for a, b, d in product(range(order), range(order), range(1, order)):
        zeros = _zeros(add, multiply[a], multiply[b], multiply[d])
        if len(zeros) == order + 1 and len({(x - y) % modulus for x in zeros for y in zeros}) == modulus:
            break
    return zeros


def _zeros(add: list[list[int]], by_a: list[int], by_b: list[int], by_d: list[int]) -> list[int]:
    """Zeros of s(i+3) = a s(i+2) + b s(i+1) + d s(i), up to one too many."""
    order = len(add)
    zeros: list[int] = []
    first, second, third = 0, 0, 1
    for position in range(order * order + order + 1):
        if first == 0:
            zeros.append(position)
            if len(zeros) > order + 1:
                break
        first, second, third = second, third, add[add[by_a[third]][by_b[second]]][by_d[first]]
    return zeros


def _field(order: int) -> tuple[list[list[int]], list[list[int]]]:
    """Tables of + and * of GF(order): 0 is zero, i+1 the i-th power of a generator."""
    prime, degree = _prime_and_degree(order)
    zero = (0,) * degree
    for reduction in product(range(prime), repeat=degree):  # x^degree = reduction, lowest coefficient first
        powers = [(1, *zero[1:])]
        for _ in range(order - 2):
            shifted = (0, *powers[-1][:-1])
            powers.append(tuple((s + powers[-1][-1] * r) % prime for s, r in zip(shifted, reduction, strict=True)))
        if len({zero, *powers}) == order:  # x generates every non-zero element
            break
    elements = np.array([zero, *powers])
    digits = prime ** np.arange(degree)
    number = np.empty(order, np.int64)
    number[elements @ digits] = np.arange(order)
    add = number[(elements[:, None] + elements) % prime @ digits]
    power = np.arange(order)
    multiply = np.where(power[:, None] * power > 0, (power[:, None] + power - 2) % (order - 1) + 1, 0)
    return add.tolist(), multiply.tolist()


def _ruler_cover(modulus: int) -> list[int]:
    """The Wichmann ruler of fewest marks for modulus/2, laid around the circle; no mark is redundant (tested)."""
    length = modulus // 2
    sizes: list[tuple[int, int, int]] = []  # marks, r, s
    for r in count():
        s = max(0, ceil_div(length - 4 * r * (r + 2) - 3, 4 * r + 3))
        sizes.append((4 * r + s + 3, r, s))
        if s == 0:
            break
    _, r, s = min(sizes)
    return sorted({mark % modulus for mark in _wichmann_ruler(r, s)})


def _wichmann_ruler(r: int, s: int) -> list[int]:
    """Marks of a ruler that measures every length up to its own, 4r(r+s+2) + 3(s+1)."""
    gaps = [1] * r + [r + 1] + [2 * r + 1] * r + [4 * r + 3] * s + [2 * r + 2] * (r + 1) + [1] * r
    return list(accumulate(gaps, initial=0))
