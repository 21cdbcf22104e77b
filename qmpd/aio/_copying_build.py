"""Builds `qmpd.aio._copying`: the loop that copies between files and leaves out what is zero.

Several threads take windows of one copy in turn, each reads its window, looks for zeroes in it and writes the rest,
all without the interpreter's lock. Without the module the same is done request by request, through the graph.
"""

from __future__ import annotations

from cffi import FFI

CDEF = """
typedef struct { uint64_t at, length, from; int32_t fd; } qmpd_part;
typedef struct { uint64_t at, length, place; } qmpd_put;
typedef struct { uint64_t place, length; } qmpd_room;
typedef struct qmpd_copy qmpd_copy;
qmpd_copy *qmpd_copy_new(int fd, const qmpd_part *parts, size_t count, uint64_t window, uint64_t unit,
                         uint64_t grain, uint64_t end, uint64_t shift, const qmpd_room *rooms, size_t room_count,
                         int in_order);
int qmpd_copy_work(qmpd_copy *c, uint8_t *buffer);
void qmpd_copy_stop(qmpd_copy *c);
size_t qmpd_copy_puts(qmpd_copy *c, const qmpd_put **puts);
void qmpd_copy_free(qmpd_copy *c);
"""

SOURCE = """
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/vfs.h>
#include <unistd.h>

/* Data to copy: `length` bytes at `from` of `fd` are the bytes at `at` of the disk. In order, apart. */
typedef struct { uint64_t at, length, from; int32_t fd; } qmpd_part;

/* What was written: `length` bytes of the disk from `at` on, to `place` in the file. */
typedef struct { uint64_t at, length, place; } qmpd_put;

/* Room in the file that may be filled, in whole units. */
typedef struct { uint64_t place, length; } qmpd_room;

typedef struct qmpd_copy {
    int fd;
    const qmpd_part *parts;
    size_t count;
    uint64_t window;            /* bytes that one thread takes at a time, a multiple of unit and grain */
    uint64_t unit;              /* bytes that are written as a whole, with zeroes around what the parts have of them */
    uint64_t grain;             /* bytes, a multiple of unit, that are left out if they are zero */
    uint64_t end;               /* of the disk: nothing behind it is written, unless there are rooms */
    uint64_t shift;             /* without rooms: what to add to an offset of the disk */
    qmpd_room *rooms;           /* what is left of each, or NULL: every byte has its place */
    size_t room_count, room;
    int in_order;
    int reserve;                /* have the file system allocate what is going to be written */
    pthread_mutex_t lock;       /* of all below, and of rooms */
    pthread_cond_t turned;
    size_t part;                /* the next window: its first part, and where it goes on in it */
    uint64_t from;
    uint64_t taken, turn;       /* windows handed out; the one whose turn it is to take room */
    int error;                  /* the first errno, which ends the copy */
    qmpd_put *puts;
    size_t put_count, put_space;
} qmpd_copy;

typedef struct { uint64_t start, end; } range;

/* What ext4 has not allocated it reserves block by block as it is written, which takes a third of the time of a write;
 * allocated at once it is not. Elsewhere, and for little, this does not pay. */
enum { EXT4 = 0xef53, WORTH = 64 << 10 };

void qmpd_copy_free(qmpd_copy *c)
{
    if (c) {
        pthread_mutex_destroy(&c->lock);
        pthread_cond_destroy(&c->turned);
        free(c->rooms);
        free(c->puts);
        free(c);
    }
}

/* `parts` stays the caller's; `rooms` is copied. NULL: no memory, or parts that are not in order. */
qmpd_copy *qmpd_copy_new(int fd, const qmpd_part *parts, size_t count, uint64_t window, uint64_t unit,
                         uint64_t grain, uint64_t end, uint64_t shift, const qmpd_room *rooms, size_t room_count,
                         int in_order)
{
    uint64_t before = 0;
    if (!unit || !grain || grain % unit || !window || window % grain || window > (1u << 30))
        return NULL;
    if (end > INT64_MAX || shift > INT64_MAX - end)
        return NULL;
    for (size_t i = 0; i < count; i++) {
        const qmpd_part *p = &parts[i];
        if (p->at < before || !p->length || p->at > end || p->length > end - p->at
                || p->from > INT64_MAX - p->length)
            return NULL;
        before = p->at + p->length;
    }
    qmpd_copy *c = calloc(1, sizeof *c);
    if (!c)
        return NULL;
    pthread_mutex_init(&c->lock, NULL);
    pthread_cond_init(&c->turned, NULL);
    c->fd = fd, c->parts = parts, c->count = count, c->window = window;
    c->unit = unit, c->grain = grain;
    c->end = end, c->shift = shift, c->in_order = in_order;
    struct statfs where;
    c->reserve = fstatfs(fd, &where) == 0 && where.f_type == EXT4;
    if (rooms) {
        c->rooms = malloc((room_count ? room_count : 1) * sizeof *rooms);
        if (!c->rooms) {
            qmpd_copy_free(c);
            return NULL;
        }
        memcpy(c->rooms, rooms, room_count * sizeof *rooms);
        c->room_count = room_count;
    }
    return c;
}

/* Let every thread end after the window it is in. */
void qmpd_copy_stop(qmpd_copy *c)
{
    pthread_mutex_lock(&c->lock);
    if (!c->error)
        c->error = ECANCELED;
    pthread_cond_broadcast(&c->turned);
    pthread_mutex_unlock(&c->lock);
}

size_t qmpd_copy_puts(qmpd_copy *c, const qmpd_put **puts)
{
    *puts = c->puts;
    return c->put_count;
}

static int fail(qmpd_copy *c, int error)
{
    pthread_mutex_lock(&c->lock);
    if (!c->error)
        c->error = error;
    pthread_cond_broadcast(&c->turned);
    pthread_mutex_unlock(&c->lock);
    return -1;
}

/* Bytes beyond the end of a file are zeroes. */
static int fill(int fd, uint8_t *to, uint64_t length, uint64_t from)
{
    while (length) {
        ssize_t got = pread(fd, to, length, (off_t)from);
        if (got < 0) {
            if (errno == EINTR)
                continue;
            return errno;
        }
        if (!got) {
            memset(to, 0, length);
            return 0;
        }
        to += got, from += (uint64_t)got, length -= (uint64_t)got;
    }
    return 0;
}

static int reserve(qmpd_copy *c, uint64_t length, uint64_t place)
{
    if (length < WORTH || !__atomic_load_n(&c->reserve, __ATOMIC_RELAXED))
        return 0;
    if (fallocate(c->fd, FALLOC_FL_KEEP_SIZE, (off_t)place, (off_t)length) == 0 || errno == EINTR)
        return 0;
    if (errno == ENOSPC || errno == EDQUOT)
        return errno;
    __atomic_store_n(&c->reserve, 0, __ATOMIC_RELAXED);
    return 0;
}

/* Larger writes make the kernel look for larger pages, for longer than they save. */
enum { PIECE = 512 << 10 };

static int store(int fd, const uint8_t *data, uint64_t length, uint64_t place)
{
    while (length) {
        ssize_t put = pwrite(fd, data, length < PIECE ? length : PIECE, (off_t)place);
        if (put < 0 && errno == EINTR)
            continue;
        if (put <= 0)
            return put ? errno : EIO;
        data += put, place += (uint64_t)put, length -= (uint64_t)put;
    }
    return 0;
}

static int blank(const uint8_t *data, uint64_t length)
{
    uint64_t word;
    while (length >= 256) {
        uint64_t sum = 0;
        for (int i = 0; i < 32; i++) {
            memcpy(&word, data + 8 * i, 8);
            sum |= word;
        }
        if (sum)
            return 0;
        data += 256, length -= 256;
    }
    while (length--)
        if (*data++)
            return 0;
    return 1;
}

/* Return where `items`, of `size` bytes each, are when there is space for `count` of them, at least one; NULL if there
 * is no memory, and they are where they were. */
static void *grown(void *items, size_t *space, size_t count, size_t size)
{
    if (count <= *space)
        return items;
    size_t wanted = count > 32 ? 2 * count : 64;
    void *more = realloc(items, wanted * size);
    if (more)
        *space = wanted;
    return more;
}

/* A list that starts anew with every window. */
typedef struct { range *items; size_t count, space; } list;

static int append(list *l, uint64_t start, uint64_t end)
{
    range *items = grown(l->items, &l->space, l->count + 1, sizeof *items);
    if (!items)
        return -1;
    l->items = items;
    l->items[l->count++] = (range){ start, end };
    return 0;
}

/* Read what the parts have of [start, stop) into the buffer, zeroes around it up to whole units. The ranges, apart and
 * in whole units, that hold it are added to the list. */
static int gather(qmpd_copy *c, size_t part, uint64_t start, uint64_t stop, uint8_t *buffer, list *ranges)
{
    const uint64_t unit = c->unit;
    uint64_t known = start;             /* the buffer is right up to here, where a range covers it */
    for (; part < c->count && c->parts[part].at < stop; part++) {
        const qmpd_part *p = &c->parts[part];
        uint64_t low = p->at > start ? p->at : start;
        uint64_t high = p->at + p->length < stop ? p->at + p->length : stop;
        if (low >= high)
            continue;
        uint64_t first = low / unit * unit, last = (high + unit - 1) / unit * unit;
        if (ranges->count && ranges->items[ranges->count - 1].end >= first) {
            ranges->items[ranges->count - 1].end = last;
        } else {
            if (known % unit)
                memset(buffer + (known - start), 0, unit - known % unit);
            if (append(ranges, first, last))
                return fail(c, ENOMEM);
            known = first;
        }
        memset(buffer + (known - start), 0, low - known);
        int error = fill(p->fd, buffer + (low - start), high - low, p->from + (low - p->at));
        if (error)
            return fail(c, error);
        known = high;
    }
    if (known % unit)
        memset(buffer + (known - start), 0, unit - known % unit);
    return 0;
}

/* Find what of the ranges is to be written: all but grains, or the parts of a grain in a range, that are zero. */
static int sift(qmpd_copy *c, const uint8_t *buffer, uint64_t start, const list *ranges, list *full)
{
    for (size_t i = 0; i < ranges->count; i++)
        for (uint64_t at = ranges->items[i].start, stop; at < ranges->items[i].end; at = stop) {
            stop = at / c->grain * c->grain + c->grain;
            if (stop > ranges->items[i].end)
                stop = ranges->items[i].end;
            if (blank(buffer + (at - start), stop - at))
                continue;
            if (full->count && full->items[full->count - 1].end == at)
                full->items[full->count - 1].end = stop;
            else if (append(full, at, stop))
                return fail(c, ENOMEM);
        }
    return 0;
}

/* Note what is going to be written, in the rooms that are next or in its own place; the lock is held. */
static int place(qmpd_copy *c, const range *full, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        uint64_t at = full[i].start, stop = full[i].end;
        if (!c->rooms && stop > c->end)
            stop = c->end;
        while (at < stop) {
            qmpd_put put = { at, stop - at, at + c->shift };
            if (c->rooms) {
                while (c->room < c->room_count && !c->rooms[c->room].length)
                    c->room++;
                if (c->room == c->room_count)
                    return ENOSPC;
                qmpd_room *room = &c->rooms[c->room];
                if (put.length > room->length)
                    put.length = room->length;
                put.place = room->place;
                room->place += put.length, room->length -= put.length;
            }
            qmpd_put *puts = grown(c->puts, &c->put_space, c->put_count + 1, sizeof *puts);
            if (!puts)
                return ENOMEM;
            c->puts = puts;
            c->puts[c->put_count++] = put;
            at += put.length;
        }
    }
    return 0;
}

/* What a thread keeps from one window to the next. */
typedef struct { list ranges, full; qmpd_put *puts; size_t put_space; } room;

/* Copy one window: the parts from `part` on that lie in [start, stop). */
static int copy_window(qmpd_copy *c, size_t part, uint64_t start, uint64_t stop, uint64_t number, uint8_t *buffer,
                       room *own)
{
    own->ranges.count = own->full.count = 0;
    if (gather(c, part, start, stop, buffer, &own->ranges) || sift(c, buffer, start, &own->ranges, &own->full))
        return -1;

    pthread_mutex_lock(&c->lock);
    while (c->in_order && c->turn != number && !c->error)
        pthread_cond_wait(&c->turned, &c->lock);
    int error = c->error;
    size_t before = c->put_count, mine = 0;
    if (!error) {
        error = place(c, own->full.items, own->full.count);
        mine = c->put_count - before;
        if (!error && mine) {
            qmpd_put *puts = grown(own->puts, &own->put_space, mine, sizeof *puts);
            if (puts)
                own->puts = memcpy(puts, c->puts + before, mine * sizeof *puts);
            else
                error = ENOMEM;
        }
        c->turn++;
        pthread_cond_broadcast(&c->turned);
    }
    pthread_mutex_unlock(&c->lock);
    if (error)
        return fail(c, error);

    for (size_t i = 0; i < mine; i++) {
        const qmpd_put *put = &own->puts[i];
        error = reserve(c, put->length, put->place);
        if (!error)
            error = store(c->fd, buffer + (put->at - start), put->length, put->place);
        if (error)
            return fail(c, error);
    }
    return 0;
}

/* Take windows until there are none; several threads may be in here, each with a buffer for one window. Returns 0, or
 * the errno that ended the copy. */
int qmpd_copy_work(qmpd_copy *c, uint8_t *buffer)
{
    room own = { { NULL, 0, 0 }, { NULL, 0, 0 }, NULL, 0 };
    pthread_mutex_lock(&c->lock);
    while (c->part < c->count && !c->error) {
        size_t part = c->part;
        uint64_t start = (c->parts[part].at + c->from) / c->window * c->window, stop = start + c->window;
        uint64_t number = c->taken++;
        while (c->part < c->count && c->parts[c->part].at + c->parts[c->part].length <= stop)
            c->part++, c->from = 0;
        if (c->part < c->count && c->parts[c->part].at < stop)
            c->from = stop - c->parts[c->part].at;
        pthread_mutex_unlock(&c->lock);
        copy_window(c, part, start, stop, number, buffer, &own);
        pthread_mutex_lock(&c->lock);
    }
    int error = c->error;
    pthread_mutex_unlock(&c->lock);
    free(own.ranges.items);
    free(own.full.items);
    free(own.puts);
    return error;
}
"""

ffibuilder = FFI()
ffibuilder.cdef(CDEF)
ffibuilder.set_source("qmpd.aio._copying", SOURCE, libraries=["pthread"], extra_compile_args=["-O3"])
