// `Partial` of partial.py. Pointers are to the first row of the first head; strides count elements.

#pragma once

struct State {
    float* num;
    float* den;
    float* max;
    long long* keys;
    long long num_head, num_row, den_head, den_row, max_head, max_row, keys_row;
};
