// The one thread of hopper.cu that loads, by TMA, and takes the items of its block.

#pragma once

#include "shared.cuh"

template <int PANELS>
__device__ __forceinline__ void load_panels(char* to, const TensorMap& map, Word* full, int panel_bytes, int row, int head) {
    for (int panel = 0; panel < PANELS; ++panel) load(to + panel * panel_bytes, map, full, panel * PANEL, row, head);
}

__device__ void produce(
    Shared& shared, const Call& call, const TensorMap& query, const TensorMap& key, const TensorMap& value) {
    Items items(call);
    Ring ring;
    int left = items.of_block();
    items.draw();
    items.look_up();
    shared.next = items.take();
    for (int turn = 0;; turn ^= 1) {
        wait(&shared.query_free, turn ^ 1);
        const Item& item = shared.items[turn];  // it has few registers
        shared.items[turn] = shared.next;
        if (item.steps == 0) {
            arrive(&shared.query_full);
            return;
        }
        arrive_expecting(&shared.query_full, QUERY_BYTES);
        load_panels<PARTS * KEY_PANELS>(shared.query, query, &shared.query_full, ROWS * ROW_BYTES, item.tile * ROWS, item.head);
#pragma unroll 1
        for (int step = 0; step < item.steps; ++step, ring.advance()) {
            const int first = item.key(step), stage = ring.stage(), phase = ring.phase();
            wait(&shared.key_free[stage], phase ^ 1);
#if LISTED
            shared.steps[ring.slot()] = {first, is_whole(item.whole, first) ? WHOLE : item.keys_left(step)};
#endif
            arrive_expecting(&shared.key_full[stage], KEY_BYTES);
            load_panels<PARTS * KEY_PANELS>(shared.key[stage], key, &shared.key_full[stage], KEYS * ROW_BYTES, first, 0);
            if (VALUE_DIM) {
                wait(&shared.value_free[stage], phase ^ 1);
                arrive_expecting(&shared.value_full[stage], VALUE_BYTES);
                load_panels<PARTS * VALUE_PANELS>(
                    shared.value[stage], value, &shared.value_full[stage], KEYS * ROW_BYTES, first, 0);
            }
            // What comes next is drawn late, for other blocks may be free before, and so that nothing waits for memory.
            if (step == max(0, item.steps - 8) && --left > 0) items.draw();
            if (step == max(0, item.steps - 6) && left > 0) items.look_up();
            if (step == max(0, item.steps - 4)) shared.next = left > 0 ? items.take() : Item{};
        }
    }
}
