// Turns of three consumers at their exponentials, in a second pass.
//
// Each scheduler of a multiprocessor has a warp of every consumer. Left alone, these wait for products at the same time and then
// all at once for the units of exponentials. So a consumer begins with its exponentials when the one before it has come far
// enough with its own.

#pragma once

#include "instructions.cuh"

#define TAKES_TURNS (SHIFTED && CONSUMERS == 3)

class Turns {
    static constexpr int FIRST = 4;  // of the named barriers: those before are each consumer's own
    const int consumer;

  public:
    __device__ explicit Turns(int consumer) : consumer(consumer) {
        if (TAKES_TURNS && consumer == CONSUMERS - 1) pass(0.0f);
    }

    __device__ __forceinline__ void wait() const {
        if (TAKES_TURNS) named_wait(FIRST + consumer, 256);
    }

    // Let the next consumer begin, as soon as `weight`, which is not negative, is known.
    __device__ __forceinline__ void pass(float weight) const {
        if (TAKES_TURNS)
            asm volatile("{\n.reg .pred known;\nsetp.geu.f32 known, %1, 0f00000000;\n@known bar.arrive %0, 256;\n}\n"
                         ::"r"(FIRST + (consumer + 1) % CONSUMERS), "f"(weight) : "memory");
    }

    // Take the last turn that was passed.
    __device__ void end() const {
        if (consumer == 0) wait();
    }
};
