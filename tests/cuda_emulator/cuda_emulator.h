// CUDA C++ on the CPU, to test kernels where there is no GPU: one fiber for each thread of a block.
//
// The text of a kernel is compiled behind this header by g++ as it stands. Blocks run one after the other, the threads
// of a block in turns: a thread runs until it waits at a barrier or in a warp operation, then another one of its warp
// does, then one of another warp. Which one is a parameter (forward, reverse, random): a kernel whose result depends on
// it lacks a barrier.
//
// What is found:
//   - a read of shared memory that nobody wrote, or that was written before a missing barrier: NaN, because all shared
//     memory is filled with 0xFF bytes before each block;
//   - __syncthreads that not all threads reach, or that threads reach at different lines;
//   - warp operations whose lanes give different masks, are not in the mask, read a lane outside it, never come, or
//     come from different lines;
//   - vector loads and stores that are not aligned, indices outside of arrays of known size, writes behind the dynamic
//     shared memory of a launch, local variables that do not fit in 64 KB.
// Writes around global arrays are found by the driver, which puts a band of NaN around each.
// What is not: the order in which other threads see writes to global memory, bank conflicts, speed, tensor cores, PTX
// (a function that needs it has a body in plain C++ under CUDA_EMULATOR), calls of logf, sinf and the like to the bit.
#pragma once
#include <link.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include <type_traits>
#include <utility>

#if !defined(__x86_64__) || defined(EMULATE_WITH_UCONTEXT)
#include <ucontext.h>
#define EMULATOR_UCONTEXT 1
#endif

#define CUDA_EMULATOR 1
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __align__(n) __attribute__((aligned(n)))
// A thread_local variable in a function is static. There is one thread of the system, so that all of them together are
// the shared memory of the block that runs, and can be found and filled as the TLS segment of this library.
#define __shared__ thread_local

struct uint3 {
    unsigned x, y, z;
};

// Dynamic shared memory has one name in all kernels: extern __shared__ unsigned char shared_bytes[];
constexpr size_t SHARED_LIMIT = 227 * 1024, SHARED_BAND = 1024;
alignas(128) thread_local unsigned char shared_bytes[SHARED_LIMIT + SHARED_BAND];

namespace emulator {

constexpr int MOST_THREADS = 1024;
constexpr size_t STACK = 64 * 1024;
constexpr uint64_t BOTTOM = 0x5AFE5AFE5AFE5AFE;  // what lies at the end of a stack
constexpr unsigned char POISON = 0xFF;

enum State { READY, IN_WARP, AT_BARRIER, DONE };

struct Fiber {
    State state;
    int stack;       // its number, -1 before the thread has run
    unsigned place;  // linear index in the block
    uint3 thread;
    int line;  // where it waits
    unsigned mask;
    int source;                 // lane that a shuffle reads
    uint64_t posted, received;  // bits of a shuffle's value, or a vote
#ifdef EMULATOR_UCONTEXT
    ucontext_t context;
#else
    void* context;  // stack pointer
#endif
};

Fiber fibers[MOST_THREADS], *current;
char* stacks;
int free_stacks[MOST_THREADS], free_count;
unsigned threads, alive, waiting;
uint32_t arrived[MOST_THREADS / 32];  // lanes of each warp that wait in a warp operation
uint3 block_index, block_size, grid_size;
decltype(Fiber::context) scheduler;
void (*body)(void*);
void* body_arguments;
bool failed;
char message[512];

#ifdef EMULATOR_UCONTEXT
void change(ucontext_t& from, ucontext_t& to) { swapcontext(&from, &to); }
#else
// Save what a called function must keep, change the stack, restore.
extern "C" void emulator_change(void** from, void* to);
asm(R"(
.text
.type emulator_change, @function
emulator_change:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulator_change, . - emulator_change
)");
void change(void*& from, void* to) { emulator_change(&from, to); }
#endif

void leave() { change(current->context, scheduler); }

template <class... A>
void report(const char* format, A... a) {
    if (failed) return;
    int n =
        snprintf(message, sizeof message, "block (%u, %u, %u), thread (%u, %u, %u), line %d: ", block_index.x,
                 block_index.y, block_index.z, current->thread.x, current->thread.y, current->thread.z, current->line);
    snprintf(message + n, sizeof message - n, format, a...);
    failed = true;
}

template <class... A>
[[noreturn]] void fail(const char* format, A... a) {
    report(format, a...);
    for (;;) leave();  // the scheduler does not come back
}

void run_fiber() {
    body(body_arguments);
    current->state = DONE;
    if (--alive && waiting == alive) fail("the thread ends while all others wait at __syncthreads");
    for (;;) leave();
}

void resume(Fiber& f) {
    current = &f;
    if (f.stack < 0) {
        f.stack = free_stacks[--free_count];
        // Not all at the same distance from a page: their tops would share a few sets of the cache.
        char* bottom = stacks + f.stack * STACK;
        char* top = bottom + STACK - f.stack % 61 * 320;
        *(uint64_t*)bottom = BOTTOM;
#ifdef EMULATOR_UCONTEXT
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = bottom + sizeof BOTTOM;
        f.context.uc_stack.ss_size = top - bottom - sizeof BOTTOM;
        f.context.uc_link = nullptr;
        makecontext(&f.context, run_fiber, 0);
#else
        void** p = (void**)((uintptr_t)top & ~uintptr_t(15));
        *--p = nullptr;  // run_fiber has no caller
        *--p = (void*)run_fiber;
        for (int k = 0; k < 6; k++) *--p = nullptr;
        f.context = p;
#endif
    }
    change(scheduler, f.context);
    if (*(uint64_t*)(stacks + f.stack * STACK) != BOTTOM)
        report("the thread needs more than %zu bytes of stack", STACK);
    if (f.state == DONE) free_stacks[free_count++] = f.stack;
}

// Wait for all threads of the block. Returns how many of them gave a true vote.
int barrier(int line, bool vote) {
    current->line = line;
    current->posted = vote;
    current->state = AT_BARRIER;
    if (++waiting < alive) {
        leave();
        return (int)current->received;
    }
    int votes = 0;
    for (unsigned i = 0; i < threads; i++) {
        if (fibers[i].state == DONE) continue;
        if (fibers[i].line != line) fail("__syncthreads, but thread %u waits at the one of line %d", i, fibers[i].line);
        votes += (int)fibers[i].posted;
    }
    if (alive < threads) fail("__syncthreads, but %u threads of the block have ended", threads - alive);
    for (unsigned i = 0; i < threads; i++) {
        fibers[i].state = READY;
        fibers[i].received = votes;
    }
    waiting = 0;
    return votes;
}

int lane() { return current->place % 32; }

// The one primitive of all warp operations: each lane of the mask posts bits and the lane it wants to read, and the
// last one to come hands them out; or all lanes get one bit for each that posted something.
uint64_t exchange(int line, unsigned mask, uint64_t bits, int source, bool ballot) {
    unsigned warp = current->place / 32;
    Fiber* lanes = fibers + 32 * warp;
    current->line = line;
    current->mask = mask;
    current->posted = bits;
    current->source = source;
    current->state = IN_WARP;
    if (!(mask >> lane() & 1)) fail("the calling lane %d is not in the mask %08x", lane(), mask);
    arrived[warp] |= 1u << lane();
    if ((arrived[warp] & mask) != mask) {
        leave();
        return current->received;
    }
    arrived[warp] &= ~mask;
    uint64_t votes = 0;
    for (int k = 0; k < 32; k++) {
        if (!(mask >> k & 1)) continue;
        if (lanes[k].mask != mask) fail("lane %d gives the mask %08x, not %08x", k, lanes[k].mask, mask);
        if (lanes[k].line != line) fail("lane %d is in the warp operation of line %d", k, lanes[k].line);
        if (!ballot && !(mask >> lanes[k].source & 1))
            fail("lane %d reads lane %d outside the mask", k, lanes[k].source);
        if (lanes[k].posted) votes |= 1ull << k;
    }
    for (int k = 0; k < 32; k++) {
        if (!(mask >> k & 1)) continue;
        lanes[k].received = ballot ? votes : lanes[lanes[k].source].posted;
        lanes[k].state = READY;
    }
    return current->received;
}

template <class T>
T shuffle(int line, unsigned mask, T value, int source) {
    static_assert(sizeof(T) <= 8, "a shuffle moves 4 or 8 bytes");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    bits = exchange(line, mask, bits, source, false);
    memcpy(&value, &bits, sizeof(T));
    return value;
}

// Where a lane would read beyond its part of the warp, it reads itself.
template <class T>
T shuffle_xor(int line, unsigned mask, T value, int other, int width = 32) {
    int at = lane() ^ other;
    return shuffle(line, mask, value, at / width > lane() / width ? lane() : at);
}
template <class T>
T shuffle_down(int line, unsigned mask, T value, unsigned by, int width = 32) {
    return shuffle(line, mask, value, lane() % width + (int)by < width ? lane() + (int)by : lane());
}
template <class T>
T shuffle_up(int line, unsigned mask, T value, unsigned by, int width = 32) {
    return shuffle(line, mask, value, lane() % width >= (int)by ? lane() - (int)by : lane());
}
template <class T>
T shuffle_from(int line, unsigned mask, T value, int from, int width = 32) {
    return shuffle(line, mask, value, lane() / width * width + (from & (width - 1)));
}
unsigned mask_of(unsigned mask = ~0u) { return mask; }

// Scheduling ------------------------------------------------------------------------------------------------------

struct Segment {
    void* start;
    size_t size;
};

// Find the thread-local variables of this library.
int find_shared(dl_phdr_info* info, size_t, void* out) {
    uintptr_t here = (uintptr_t)&find_shared;
    bool ours = false;
    for (int k = 0; k < info->dlpi_phnum; k++) {
        uintptr_t start = info->dlpi_addr + info->dlpi_phdr[k].p_vaddr;
        ours |= info->dlpi_phdr[k].p_type == PT_LOAD && here >= start && here < start + info->dlpi_phdr[k].p_memsz;
    }
    if (!ours) return 0;
    for (int k = 0; k < info->dlpi_phnum; k++)
        if (info->dlpi_phdr[k].p_type == PT_TLS) *(Segment*)out = {info->dlpi_tls_data, info->dlpi_phdr[k].p_memsz};
    return 1;
}

enum Order { FORWARD, REVERSE, RANDOM };

unsigned draw(uint64_t& random) {
    random = random * 6364136223846793005u + 1442695040888963407u;
    return (unsigned)(random >> 33);
}

// Bring 0 .. n - 1 into an order.
void arrange(unsigned* places, unsigned n, int order, uint64_t& random) {
    for (unsigned i = 0; i < n; i++) places[i] = order == REVERSE ? n - 1 - i : i;
    for (unsigned i = n; order == RANDOM && i > 1; i--) std::swap(places[i - 1], places[draw(random) % i]);
}

// Let the lanes of a warp run that can, each until it waits. Returns whether there were any.
bool run_warp(unsigned warp, int order, uint64_t& random) {
    unsigned lanes[32];
    bool moved = false;
    arrange(lanes, 32, order, random);
    for (unsigned k : lanes) {
        unsigned i = 32 * warp + k;
        if (i >= threads || fibers[i].state != READY || failed) continue;
        moved = true;
        resume(fibers[i]);
    }
    return moved;
}

void run_block(size_t dynamic, int order, uint64_t& random) {
    Segment shared{};
    shared_bytes[0] = POISON;  // the variables exist from the first use on
    dl_iterate_phdr(find_shared, &shared);
    memset(shared.start, POISON, shared.size);
    threads = alive = block_size.x * block_size.y * block_size.z;
    waiting = 0;
    memset(arrived, 0, sizeof arrived);
    for (free_count = 0; free_count < MOST_THREADS; free_count++)
        free_stacks[free_count] = MOST_THREADS - 1 - free_count;
    for (unsigned i = 0; i < threads; i++) {
        fibers[i].state = READY;
        fibers[i].stack = -1;
        fibers[i].place = i;
        fibers[i].line = 0;
        fibers[i].thread = {i % block_size.x, i / block_size.x % block_size.y, i / (block_size.x * block_size.y)};
    }
    while (alive && !failed) {
        bool moved = false;
        unsigned warps[MOST_THREADS / 32], count = (threads + 31) / 32;
        arrange(warps, count, order, random);
        // A warp runs on as far as it can, ahead of all others: what fast warps overwrite too early shows. In random
        // order some of them stop after one turn.
        for (unsigned k = 0; k < count; k++)
            while (run_warp(warps[k], order, random)) {
                moved = true;
                if (order == RANDOM && draw(random) % 8 == 0) break;
            }
        if (moved || failed) continue;
        for (unsigned i = 0; i < threads; i++) {
            if (fibers[i].state == DONE) continue;
            current = fibers + i;
            if (current->state == IN_WARP) break;
        }
        report(current->state == IN_WARP ? "the warp operation waits for lanes of its mask that never come"
                                         : "__syncthreads waits for threads that never come");
    }
    for (size_t k = dynamic; k < dynamic + SHARED_BAND; k++)
        if (shared_bytes[k] != POISON)
            report("byte %zu of the dynamic shared memory is written, it has %zu", k, dynamic);
}

const char* run_grid(const unsigned* grid, const unsigned* block, size_t dynamic, int order, unsigned seed,
                     void (*kernel)(void*), void* arguments) {
    if ((size_t)block[0] * block[1] * block[2] > MOST_THREADS) return "more than 1024 threads in a block";
    if (dynamic > SHARED_LIMIT) return "more than 227 KB of dynamic shared memory";
    if (!stacks)  // one more in front, for what the first one overflows into
        stacks = STACK + (char*)mmap(nullptr, (MOST_THREADS + 1) * STACK, PROT_READ | PROT_WRITE,
                                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    grid_size = {grid[0], grid[1], grid[2]};
    block_size = {block[0], block[1], block[2]};
    body = kernel;
    body_arguments = arguments;
    failed = false;
    uint64_t random = seed;
    unsigned count = grid[0] * grid[1] * grid[2];
    unsigned* blocks = new unsigned[count];
    arrange(blocks, count, order, random);
    for (unsigned k = 0; k < count && !failed; k++) {
        block_index = {blocks[k] % grid[0], blocks[k] / grid[0] % grid[1], blocks[k] / (grid[0] * grid[1])};
        run_block(dynamic, order, random);
    }
    delete[] blocks;
    return failed ? message : nullptr;
}

// Kernels as functions of addresses, as the driver of a GPU takes them --------------------------------------------

struct Parameter {
    char pointer, constant, kind, size;  // kind: f, i or u; of what is pointed to
};

template <class T>
constexpr Parameter describe() {
    using V = std::remove_cv_t<std::remove_pointer_t<T>>;
    return {std::is_pointer<T>::value, std::is_const<std::remove_pointer_t<T>>::value,
            std::is_floating_point<V>::value ? 'f'
            : std::is_signed<V>::value       ? 'i'
                                             : 'u',
            (char)sizeof(V)};
}

template <class... A>
struct Kernel {
    void (*function)(A...);
    void** arguments;
    template <size_t... I>
    void call(std::index_sequence<I...>) {
        function(*(std::remove_reference_t<A>*)arguments[I]...);
    }
    static void run(void* self) { ((Kernel*)self)->call(std::index_sequence_for<A...>{}); }
};

template <class... A>
const char* launch(void (*f)(A...), const unsigned* grid, const unsigned* block, size_t dynamic, int order,
                   unsigned seed, void** arguments) {
    Kernel<A...> kernel{f, arguments};
    return run_grid(grid, block, dynamic, order, seed, Kernel<A...>::run, &kernel);
}

template <class... A>
const Parameter* parameters(void (*)(A...)) {
    static const Parameter list[] = {describe<A>()..., {2, 0, 0, 0}};
    return list;
}

}  // namespace emulator

#define EMULATOR_VISIBLE extern "C" __attribute__((visibility("default")))
#define EMULATOR_EXPORT(name)                                                                                          \
    EMULATOR_VISIBLE const char* launch_##name(const unsigned* grid, const unsigned* block, size_t dynamic, int order, \
                                               unsigned seed, void** arguments) {                                      \
        return emulator::launch(name, grid, block, dynamic, order, seed, arguments);                                   \
    }                                                                                                                  \
    EMULATOR_VISIBLE const emulator::Parameter* parameters_##name() { return emulator::parameters(name); }

// g++ -fsanitize=alignment,bounds calls these; its own library would only print.
struct SanitizerPlace {
    const char* file;
    unsigned line, column;
};
extern "C" __attribute__((used)) void __ubsan_handle_type_mismatch_v1(SanitizerPlace* place, uintptr_t address) {
    emulator::current->line = (int)place->line;
    emulator::fail("the address %#zx is not aligned", (size_t)address);
}
extern "C" __attribute__((used)) void __ubsan_handle_out_of_bounds(SanitizerPlace* place, uintptr_t index) {
    emulator::current->line = (int)place->line;
    emulator::fail("the index %zd is outside of the array", (ssize_t)index);
}

// The language ----------------------------------------------------------------------------------------------------

#define threadIdx emulator::current->thread
#define blockIdx emulator::block_index
#define blockDim emulator::block_size
#define gridDim emulator::grid_size
#define __syncthreads() ((void)emulator::barrier(__LINE__, false))
#define __syncthreads_or(vote) (emulator::barrier(__LINE__, (vote)) != 0)
#define __syncwarp(...) ((void)emulator::exchange(__LINE__, emulator::mask_of(__VA_ARGS__), 0, 0, true))
#define __shfl_xor_sync(...) emulator::shuffle_xor(__LINE__, __VA_ARGS__)
#define __shfl_down_sync(...) emulator::shuffle_down(__LINE__, __VA_ARGS__)
#define __shfl_up_sync(...) emulator::shuffle_up(__LINE__, __VA_ARGS__)
#define __shfl_sync(...) emulator::shuffle_from(__LINE__, __VA_ARGS__)
#define __ballot_sync(mask, vote) ((unsigned)emulator::exchange(__LINE__, (mask), (vote) ? 1 : 0, 0, true))

template <class T>
T min(T a, T b) {
    return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
    return a < b ? b : a;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((uint64_t)a * b >> 32); }
inline float __uint_as_float(unsigned bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
inline unsigned __float_as_uint(float x) {
    unsigned bits;
    memcpy(&bits, &x, 4);
    return bits;
}
// Blocks run one after the other, so that nothing comes in between.
inline unsigned atomicInc(unsigned* at, unsigned last) {
    unsigned before = *at;
    *at = before >= last ? 0 : before + 1;
    return before;
}
inline void __threadfence() {}
// Rounded once each; compiled with -ffp-contract=off, so that a product and a sum stay two operations.
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __int2float_rn(int a) { return (float)a; }
