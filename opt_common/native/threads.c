/* A pool of threads that wait for work for a moment before they sleep: while a model decodes, the next product comes
   some microseconds after the last, and to wake a thread takes longer than that. */

#define _GNU_SOURCE
#include "threads.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <unistd.h>

/* Turns of the loop in which a thread waits before it sleeps: some 50 microseconds. */
#define PATIENCE 2000

/* The number of the current call and, in the lowest byte, how many threads take part: one word, so that a thread that
   takes no part never looks at anything else of a call. */
static atomic_uint call;
static atomic_int unfinished, sleepers;
static void (*current_part)(void *, int, int);
static void *current_argument;

static pthread_mutex_t one_caller = PTHREAD_MUTEX_INITIALIZER;
static pthread_mutex_t bed = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t alarm_clock = PTHREAD_COND_INITIALIZER;
static int started;

static inline void pause_briefly(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static unsigned wait_for_call(unsigned seen) {
    for (int turn = 0; turn < PATIENCE; turn++) {
        unsigned now = atomic_load_explicit(&call, memory_order_acquire);
        if (now != seen) return now;
        pause_briefly();
    }
    pthread_mutex_lock(&bed);
    atomic_fetch_add(&sleepers, 1);
    while (atomic_load(&call) == seen) pthread_cond_wait(&alarm_clock, &bed);
    atomic_fetch_sub(&sleepers, 1);
    pthread_mutex_unlock(&bed);
    return atomic_load(&call);
}

/* What a thread is told when it starts: its part, and the call that it is too late for. */
static struct seat {
    int index;
    unsigned seen;
} seats[MAX_THREADS];

static void *work(void *argument) {
    const struct seat *seat = argument;
    int index = seat->index;
    unsigned seen = seat->seen;
    for (;;) {
        seen = wait_for_call(seen);
        int count = (int)(seen & 0xff);
        if (index >= count) continue;
        current_part(current_argument, index, count);
        atomic_fetch_sub_explicit(&unfinished, 1, memory_order_release);
    }
    return NULL;
}

/* A child process has the memory of the pool, and none of its threads. */
static void forget_threads(void) {
    started = 0;
    atomic_store(&sleepers, 0);
    pthread_mutex_init(&one_caller, NULL);
    pthread_mutex_init(&bed, NULL);
    pthread_cond_init(&alarm_clock, NULL);
}

int opt_count_of_threads(int wanted, size_t bytes) {
    const char *limit = wanted > 0 ? NULL : getenv("OMP_NUM_THREADS");
    int count = limit ? atoi(limit) : wanted;
#ifdef __linux__
    cpu_set_t set;
    if (count <= 0 && sched_getaffinity(0, sizeof set, &set) == 0) count = CPU_COUNT(&set);
#endif
    if (count <= 0) count = (int)sysconf(_SC_NPROCESSORS_ONLN);
    count = count < 1 ? 1 : count > MAX_THREADS ? MAX_THREADS : count;
    /* A thread that has less than this to do is not worth waking. */
    size_t most = bytes / 65536 + 1;
    return (size_t)count < most ? count : (int)most;
}

/* How many threads there are, of `wanted`, the caller's among them. */
static int start_threads(int wanted) {
    if (started == 0) {
        static int told;
        if (!told) told = pthread_atfork(NULL, NULL, forget_threads) == 0;
        started = 1;
    }
    if (started >= wanted) return wanted;
    /* Signals are for the threads of the program. */
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &before);
    while (started < wanted) {
        pthread_t thread;
        seats[started] = (struct seat){started, atomic_load(&call)};
        if (pthread_create(&thread, NULL, work, &seats[started]) != 0) break;
        pthread_detach(thread);
        started++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return started;
}

/* Threads of a team that are held together for one call after another: to call a team takes microseconds each time.

   A ticket has the number of the call, how many parts that has, and which of them is the next to be taken, in eight bits
   each of the last two. Who takes one part has the call wait for it; who comes late finds none. */
struct gang {
    _Atomic uint64_t ticket;
    atomic_int unfinished, is_over;
    void (*part)(void *, int, int);
    void *argument;
    void (*whole)(void *);
    void *whole_argument;
};

/* The gang that this thread leads. */
static _Thread_local struct gang *own_gang;

/* Take and do one part of the current call, if there is one left. */
static int take_part(struct gang *gang) {
    uint64_t ticket = atomic_load_explicit(&gang->ticket, memory_order_acquire);
    int next = (int)(ticket & 0xff), count = (int)(ticket >> 8 & 0xff);
    if (next >= count) return 0;
    if (!atomic_compare_exchange_strong(&gang->ticket, &ticket, ticket + 1)) return 1;
    gang->part(gang->argument, next, count);
    atomic_fetch_sub_explicit(&gang->unfinished, 1, memory_order_release);
    return 1;
}

static void run_in_gang(struct gang *gang, void (*part)(void *, int, int), void *argument, int count) {
    gang->part = part;
    gang->argument = argument;
    atomic_store(&gang->unfinished, count);
    uint64_t number = (atomic_load(&gang->ticket) >> 16) + 1;
    atomic_store_explicit(&gang->ticket, number << 16 | (uint64_t)count << 8, memory_order_release);
    while (take_part(gang)) continue;
    for (int turn = 0; atomic_load_explicit(&gang->unfinished, memory_order_acquire) > 0; turn++) {
        if (turn >= PATIENCE) sched_yield();
        else pause_briefly();
    }
}

static void be_in_gang(void *argument) {
    struct gang *gang = argument;
    if (own_gang == gang) {
        gang->whole(gang->whole_argument);
        atomic_store(&gang->is_over, 1);
        return;
    }
    for (int turn = 0; !atomic_load_explicit(&gang->is_over, memory_order_acquire); turn++) {
        /* Where there are more threads than processors, the leader may be waiting for this one's. */
        if (take_part(gang)) turn = 0;
        else if (turn >= PATIENCE) sched_yield();
        else pause_briefly();
    }
}

void opt_hold_together(void (*whole)(void *argument), void *argument, int count, run_team *team) {
    if (!team || count == 1 || own_gang) {
        whole(argument);
        return;
    }
    struct gang gang = {.whole = whole, .whole_argument = argument};
    own_gang = &gang;
    team(be_in_gang, &gang, (unsigned)count, 0);
    own_gang = NULL;
}

struct shared_work {
    void (*part)(void *, int, int);
    void *argument;
    int count;
    atomic_int next;
};

static void take_parts(void *argument) {
    struct shared_work *work = argument;
    for (int index; (index = atomic_fetch_add(&work->next, 1)) < work->count;)
        work->part(work->argument, index, work->count);
}

int opt_run_parts(void (*part)(void *argument, int index, int count), void *argument, int count, run_team *team) {
    if (count == 1) {
        part(argument, 0, 1);
        return 1;
    }
    if (own_gang) {
        run_in_gang(own_gang, part, argument, count);
        return count;
    }
    if (team) {
        struct shared_work work = {part, argument, count, 0};
        team(take_parts, &work, (unsigned)count, 0);
        return count;
    }
    pthread_mutex_lock(&one_caller);
    count = start_threads(count);
    current_part = part;
    current_argument = argument;
    atomic_store(&unfinished, count - 1);
    atomic_store(&call, ((atomic_load(&call) >> 8) + 1) << 8 | (unsigned)count);
    if (atomic_load(&sleepers) > 0) {
        pthread_mutex_lock(&bed);
        pthread_cond_broadcast(&alarm_clock);
        pthread_mutex_unlock(&bed);
    }
    part(argument, 0, count);
    for (int turn = 0; atomic_load_explicit(&unfinished, memory_order_acquire) > 0; turn++) {
        /* Who has no processor at this moment is to get one. */
        if (turn >= PATIENCE) sched_yield();
        else pause_briefly();
    }
    pthread_mutex_unlock(&one_caller);
    return count;
}
