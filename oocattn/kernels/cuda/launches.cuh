// Launches that begin before the one ahead of them in the stream has ended (programmatic dependent launch, from compute
// capability 9.0 on; before, launches follow one another).

#pragma once

// Wait until all that was launched before is done, and what it has written can be read.
__device__ __forceinline__ void wait_for_launch_before() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Let the next launch begin as soon as there is room for it.
__device__ __forceinline__ void let_next_launch_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
