/* Drives NBD exports through libnbd: what `make bench` measures every server with.
 *
 *     client URI read|write|randread|randwrite BYTES DEPTH CONNECTIONS SECONDS
 *     client URI sum
 *
 * The first form keeps DEPTH requests of BYTES under way on each of CONNECTIONS connections, a thread
 * for each, and prints "bytes seconds requests". The second reads the whole export and prints a sum of
 * what it holds, by which the driver sees that all servers serve the same.
 *
 * The few calls that are used are declared here, so that the library is enough and its headers need not
 * be installed; its interface is stable (LIBNBD_1.0).
 */

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

struct nbd_handle;
typedef struct {
    int (*callback)(void *user_data, int *error);
    void *user_data;
    void (*free)(void *user_data);
} nbd_completion_callback;

extern struct nbd_handle *nbd_create(void);
extern void nbd_close(struct nbd_handle *h);
extern const char *nbd_get_error(void);
extern int nbd_connect_uri(struct nbd_handle *h, const char *uri);
extern int nbd_shutdown(struct nbd_handle *h, uint32_t flags);
extern int64_t nbd_get_size(struct nbd_handle *h);
extern int nbd_poll(struct nbd_handle *h, int timeout);
extern int64_t nbd_aio_pread(struct nbd_handle *h, void *buf, size_t count, uint64_t offset,
                             nbd_completion_callback callback, uint32_t flags);
extern int64_t nbd_aio_pwrite(struct nbd_handle *h, const void *buf, size_t count, uint64_t offset,
                              nbd_completion_callback callback, uint32_t flags);
extern int nbd_pread(struct nbd_handle *h, void *buf, size_t count, uint64_t offset, uint32_t flags);

enum { MAX_DEPTH = 256, MAX_CONNECTIONS = 16, WARM_MS = 20 };

static const char *uri;
static bool writing, random_order;
static size_t length;
static int depth;
static double seconds;
static atomic_ullong next_block;
static pthread_barrier_t ready;

struct worker {
    pthread_t thread;
    int number;
    uint64_t bytes, requests;
    double took;
};

struct slot {
    struct worker *worker;
    uint8_t *data;
    bool done;
};

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static void fail(const char *what)
{
    fprintf(stderr, "client: %s: %s\n", what, nbd_get_error());
    exit(1);
}

static uint64_t scrambled(uint64_t *state)
{
    *state ^= *state << 13, *state ^= *state >> 7, *state ^= *state << 17;
    return *state;
}

static struct nbd_handle *connected(void)
{
    struct nbd_handle *h = nbd_create();
    if (!h || nbd_connect_uri(h, uri) == -1)
        fail(uri);
    return h;
}

static int completed(void *user_data, int *error)
{
    struct slot *slot = user_data;
    if (*error) {
        fprintf(stderr, "client: a request failed: %s\n", strerror(*error));
        exit(1);
    }
    slot->done = true;
    return 1;
}

/* Keep the slots busy until `until`, then wait for the last of them; returns when that came. */
static double run(struct nbd_handle *h, struct slot *slots, uint64_t blocks, uint64_t *seed, double until)
{
    struct worker *worker = slots[0].worker;
    int busy = 0;
    for (int i = 0; i < depth; i++)
        slots[i].done = true;
    worker->requests = 0;
    for (;;) {
        bool more = now() < until;
        for (int i = 0; i < depth; i++) {
            struct slot *slot = &slots[i];
            if (!slot->done || !more)
                continue;
            uint64_t block = random_order ? scrambled(seed) : atomic_fetch_add(&next_block, 1);
            nbd_completion_callback callback = { completed, slot, NULL };
            uint64_t offset = block % blocks * length;
            slot->done = false;
            busy++;
            if ((writing ? nbd_aio_pwrite(h, slot->data, length, offset, callback, 0)
                         : nbd_aio_pread(h, slot->data, length, offset, callback, 0)) == -1)
                fail("request");
        }
        int waiting = 0;
        for (int i = 0; i < depth; i++)
            waiting += !slots[i].done;
        worker->requests += (uint64_t)(busy - waiting);
        busy = waiting;
        if (!busy && !more)
            return now();
        if (busy && nbd_poll(h, -1) == -1)
            fail("poll");
    }
}

static void *work(void *argument)
{
    struct worker *worker = argument;
    struct nbd_handle *h = connected();
    uint64_t blocks = (uint64_t)nbd_get_size(h) / length;
    uint64_t seed = 0x9e3779b97f4a7c15u * (uint64_t)(worker->number + 1) ^ (uint64_t)(now() * 1e6);
    struct slot slots[MAX_DEPTH];
    for (int i = 0; i < depth; i++) {
        slots[i] = (struct slot){ .worker = worker, .data = aligned_alloc(4096, (length + 4095) & ~(size_t)4095) };
        for (size_t at = 0; at + 8 <= length; at += 8) {
            uint64_t word = scrambled(&seed);
            memcpy(slots[i].data + at, &word, 8);
        }
    }
    run(h, slots, blocks, &seed, now() + WARM_MS * 1e-3);
    pthread_barrier_wait(&ready);
    double began = now();
    worker->took = run(h, slots, blocks, &seed, began + seconds) - began;
    worker->bytes = worker->requests * length;
    nbd_shutdown(h, 0);
    nbd_close(h);
    return NULL;
}

static int sum(void)
{
    enum { STEP = 1 << 20 };
    static uint64_t words[STEP / 8];
    struct nbd_handle *h = connected();
    uint64_t total = 0, size = (uint64_t)nbd_get_size(h);
    for (uint64_t at = 0; at < size; at += STEP) {
        size_t now_bytes = size - at < STEP ? (size_t)(size - at) : STEP;
        if (nbd_pread(h, words, now_bytes, at, 0) == -1)
            fail("read");
        for (size_t i = 0; i < now_bytes / 8; i++)
            total = (total ^ words[i]) * 0x100000001b3u;
    }
    printf("%llu %016llx\n", (unsigned long long)size, (unsigned long long)total);
    nbd_close(h);
    return 0;
}

int main(int argc, char **argv)
{
    static struct worker workers[MAX_CONNECTIONS];
    if (argc == 3 && !strcmp(argv[2], "sum")) {
        uri = argv[1];
        return sum();
    }
    if (argc != 7) {
        fprintf(stderr, "usage: client URI read|write|randread|randwrite BYTES DEPTH CONNECTIONS SECONDS\n");
        return 2;
    }
    uri = argv[1];
    random_order = !strncmp(argv[2], "rand", 4);
    writing = !strcmp(argv[2] + (random_order ? 4 : 0), "write");
    length = strtoul(argv[3], NULL, 10);
    depth = atoi(argv[4]);
    int connections = atoi(argv[5]);
    seconds = atof(argv[6]);
    if (!length || depth < 1 || depth > MAX_DEPTH || connections < 1 || connections > MAX_CONNECTIONS) {
        fprintf(stderr, "client: sizes out of range\n");
        return 2;
    }
    pthread_barrier_init(&ready, NULL, (unsigned)connections);
    for (int i = 0; i < connections; i++) {
        workers[i].number = i;
        if (pthread_create(&workers[i].thread, NULL, work, &workers[i]))
            return 1;
    }
    uint64_t bytes = 0, requests = 0;
    double took = 0;
    for (int i = 0; i < connections; i++) {
        pthread_join(workers[i].thread, NULL);
        bytes += workers[i].bytes, requests += workers[i].requests;
        took = workers[i].took > took ? workers[i].took : took;
    }
    printf("%llu %.6f %llu\n", (unsigned long long)bytes, took, (unsigned long long)requests);
    return 0;
}
