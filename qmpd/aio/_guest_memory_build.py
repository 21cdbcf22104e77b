"""Builds `qmpd.aio._guest_memory`: what shared memory of a guest needs and Python has no word for.

Two things. A fence, as ring indexes of virtio are read and written without locks. And a guard: whoever
shares a file with us can make it shorter, and touching what is gone raises SIGBUS, which would end the
daemon with all it serves. A guarded page that is gone becomes one of zeroes of our own, and the guard says
so. Where no compiler is there at install, exports that need this are refused.
"""

from __future__ import annotations

from cffi import FFI

CDEF = """
void qmpd_fence(void);
int qmpd_guard(uint8_t *start, size_t length, size_t page);
int qmpd_guard_hit(int number);
void qmpd_unguard(int number);
"""

SOURCE = """
#define _GNU_SOURCE
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>

#define GUARDS 4096

static struct {
    uintptr_t start;            /* 0: free; written last, read first */
    size_t length, page;        /* bytes */
    int hit;
} guards[GUARDS];

static struct sigaction before;
static int installed;

void qmpd_fence(void)
{
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

/* Only what POSIX and Linux let a handler call; the faulting load or store is then done again. */
static void on_sigbus(int number, siginfo_t *info, void *context)
{
    uintptr_t at = (uintptr_t)info->si_addr;
    (void)context;
    for (int i = 0; i < GUARDS; i++) {
        uintptr_t start = __atomic_load_n(&guards[i].start, __ATOMIC_ACQUIRE);
        if (!start || at < start || at - start >= guards[i].length)
            continue;
        void *page = (void *)(at & ~(uintptr_t)(guards[i].page - 1));
        void *mine = mmap(page, guards[i].page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
        if (mine == page) {
            __atomic_store_n(&guards[i].hit, 1, __ATOMIC_RELEASE);
            return;
        }
    }
    sigaction(number, &before, NULL);   /* not ours: it comes again, to whom it concerns */
}

int qmpd_guard(uint8_t *start, size_t length, size_t page)
{
    if (!installed) {
        struct sigaction action;
        memset(&action, 0, sizeof action);
        action.sa_sigaction = on_sigbus;
        action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
        sigemptyset(&action.sa_mask);
        if (sigaction(SIGBUS, &action, &before))
            return -1;
        installed = 1;
    }
    for (int i = 0; i < GUARDS; i++)
        if (!guards[i].start) {
            guards[i].length = length;
            guards[i].page = page;
            guards[i].hit = 0;
            __atomic_store_n(&guards[i].start, (uintptr_t)start, __ATOMIC_RELEASE);
            return i;
        }
    return -1;
}

int qmpd_guard_hit(int number)
{
    return __atomic_load_n(&guards[number].hit, __ATOMIC_ACQUIRE);
}

void qmpd_unguard(int number)
{
    __atomic_store_n(&guards[number].start, (uintptr_t)0, __ATOMIC_RELEASE);
}
"""

ffibuilder = FFI()
ffibuilder.cdef(CDEF)
ffibuilder.set_source("qmpd.aio._guest_memory", SOURCE, extra_compile_args=["-O2"])
