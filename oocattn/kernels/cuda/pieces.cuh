// Documents of consecutive rows, and the keys that their rows attend: `Bounds` of problem/mask.py, as arguments of a launch.

#pragma once

// A bound that rises by one key a row, between two limits.
template <typename Int>
struct Ramp {
    Int offset, least, most;
    __device__ Int at(Int row) const { return min(max(row + offset, least), most); }
};

// The keys [a, b) and [c, d) of a row, a <= b <= c <= d.
template <typename Int>
struct Intervals {
    Int a, b, c, d;
};

// The rows before `stop_row`, from that of the piece before on; row i is at key i + position.
template <typename Int>
struct Piece {
    Int stop_row, start;
    Ramp<Int> stop;
    Int fixed;
    Ramp<Int> resume;
    Int position;

    __device__ Intervals<Int> at(Int row) const {
        const Int end = stop.at(row), first = min(fixed, end);
        return {start, first, max(min(resume.at(row), end), first), end};
    }
};

template <typename Int, int MOST>
struct Pieces {
    Int first_row, count;
    Piece<Int> all[MOST];

    // The piece that has a row.
    __device__ int find(Int row) const {
        int low = 0, high = int(count) - 1;
        while (low < high) {
            const int middle = (low + high) / 2;
            if (row < all[middle].stop_row)
                high = middle;
            else
                low = middle + 1;
        }
        return low;
    }

    __device__ Int start_row(int piece) const { return piece ? all[piece - 1].stop_row : first_row; }
};
