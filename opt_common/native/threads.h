/* Threads that work on the parts of one thing together. */

#ifndef OPT_THREADS_H
#define OPT_THREADS_H

#include <stddef.h>

#define MAX_THREADS 64

/* How many threads are to read so many bytes: `wanted` ones at most. Where that is 0, OMP_NUM_THREADS says how many, or else
   there are as many as processors to run on. */
int opt_count_of_threads(int wanted, size_t bytes);

/* What runs a function on each of some threads that somebody else has: OpenMP's GOMP_parallel. */
typedef void run_team(void (*function)(void *argument), void *argument, unsigned threads, unsigned flags);

/* Run part(argument, index, count) for each index below `count`, and return when all are done: how many there were.

   They run on the threads of a team, or where that is NULL on `count` of our own, or fewer where no more can be started;
   then calls from several threads wait for each other. Two sets of threads that wait for work would take the processors
   from each other: where OpenMP's are at work anyway, they are the ones to take. */
int opt_run_parts(void (*part)(void *argument, int index, int count), void *argument, int count, run_team *team);

/* Run a function that calls opt_run_parts many times, and hold the threads of a team together for it meanwhile: `count` of
   them, the caller's among them. What has no team runs as it would by itself. */
void opt_hold_together(void (*whole)(void *argument), void *argument, int count, run_team *team);

#endif
