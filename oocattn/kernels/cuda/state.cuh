// `AttentionState` of state.py. Pointers are to the first row of the first head; strides count elements.

#pragma once

struct State {
    float* num;
    float* den;
    float* max;
    unsigned long long *keys, *key_sum;  // the ledger, modulo 2^64
    long long num_head, num_row, den_head, den_row, max_head, max_row, keys_row, key_sum_row;
};
