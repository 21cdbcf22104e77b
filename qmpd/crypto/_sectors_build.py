"""Builds `qmpd.crypto._sectors`, the compiled sector loop: `python -m qmpd.crypto._sectors_build`.

The C below knows no cryptography of its own: for every sector it computes the initial value and
calls OpenSSL's EVP functions on it, so that a whole batch costs one call from Python and runs
without the interpreter's lock. The build needs a C compiler and OpenSSL's headers; where they are
missing `crypto.cipher` falls back to its reference engine.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from cffi import FFI, VerificationError

CDEF = """
typedef struct qmpd_sectors qmpd_sectors;
typedef struct {
    uint64_t sector;
    uint64_t length;
    const uint8_t *source;
    uint8_t *target;
} qmpd_span;
typedef struct {
    uint64_t sector, offset, length, at;
} qmpd_extent;
int qmpd_key_length(const char *cipher);
qmpd_sectors *qmpd_sectors_new(const char *cipher, int encrypt, const uint8_t *key, uint32_t sector_size,
                               int iv_kind, const char *essiv_cipher, const uint8_t *essiv_key, int helper);
int qmpd_sectors_run(qmpd_sectors *s, const qmpd_span *spans, size_t count);
int qmpd_sectors_one(qmpd_sectors *s, uint64_t sector, uint64_t length, const uint8_t *source, uint8_t *target);
int qmpd_sectors_share(qmpd_sectors *s, qmpd_sectors *helper, const qmpd_span *spans, size_t count);
int64_t qmpd_read_extents(qmpd_sectors *s, qmpd_sectors *helper, int fd, const qmpd_extent *extents, size_t count,
                          uint8_t *base, uint64_t room);
int64_t qmpd_write_extents(qmpd_sectors *s, qmpd_sectors *helper, int fd, const qmpd_extent *extents, size_t count,
                           const uint8_t *base, uint64_t room);
void qmpd_sectors_free(qmpd_sectors *s);
const char *qmpd_openssl_version(void);
"""

SOURCE = """
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <pthread.h>
#include <signal.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>
#include <openssl/crypto.h>
#include <openssl/err.h>
#include <openssl/evp.h>

#define MAX_IV 16
enum { IV_NONE, IV_PLAIN, IV_PLAIN64, IV_PLAIN64BE, IV_BENBI, IV_NULL, IV_ESSIV };

typedef struct qmpd_sectors {
    EVP_CIPHER_CTX *data;       /* key set once; the IV is set for each sector */
    EVP_CIPHER_CTX *essiv;      /* ECB encryption of the sector number, or NULL */
    uint32_t sector_size;       /* bytes */
    int iv_kind, iv_length;     /* bytes */
    int benbi_shift;            /* blocks in 512 bytes, as a power of two */
    uint8_t *scratch;           /* ciphertext on its way to a file, SCRATCH bytes, or NULL */
} qmpd_sectors;

typedef struct {
    uint64_t sector;            /* number of the first sector, counted in 512 bytes */
    uint64_t length;            /* bytes, a multiple of sector_size */
    const uint8_t *source;
    uint8_t *target;            /* may be source, may not overlap it otherwise */
} qmpd_span;

int qmpd_key_length(const char *cipher)
{
    const EVP_CIPHER *found = EVP_get_cipherbyname(cipher);
    if (found) {
        /* A name may be known although no provider offers it: only a context tells. */
        EVP_CIPHER_CTX *probe = EVP_CIPHER_CTX_new();
        int ok = probe && EVP_CipherInit_ex(probe, found, NULL, NULL, NULL, 1) == 1;
        int length = ok ? EVP_CIPHER_key_length(found) : -1;
        EVP_CIPHER_CTX_free(probe);
        ERR_clear_error();
        return length;
    }
    ERR_clear_error();
    return -1;
}

const char *qmpd_openssl_version(void)
{
    return OpenSSL_version(OPENSSL_VERSION);
}

void qmpd_sectors_free(qmpd_sectors *s)
{
    if (s) {
        EVP_CIPHER_CTX_free(s->data);       /* wipes the key schedule */
        EVP_CIPHER_CTX_free(s->essiv);
        free(s->scratch);
        OPENSSL_cleanse(s, sizeof *s);
        free(s);
    }
}

/* Setting an IV counts references of the cipher, which two threads must not share: the helper's contexts
 * take theirs from a library context of their own. */
static const EVP_CIPHER *cipher_for(const char *name, int helper)
{
#if OPENSSL_VERSION_NUMBER >= 0x30000000L
    static OSSL_LIB_CTX *apart;
    if (helper) {
        if (!apart)
            apart = OSSL_LIB_CTX_new();
        return apart ? EVP_CIPHER_fetch(apart, name, NULL) : NULL;     /* kept: there are few names */
    }
#endif
    (void)helper;
    return EVP_get_cipherbyname(name);
}

static EVP_CIPHER_CTX *context(const char *name, int encrypt, const uint8_t *key, int helper)
{
    const EVP_CIPHER *cipher = cipher_for(name, helper);
    EVP_CIPHER_CTX *ctx = cipher ? EVP_CIPHER_CTX_new() : NULL;
    static const uint8_t iv[MAX_IV];
    /* Only where it means anything: a context without padding says so to OpenSSL again with every IV. */
    int mode = cipher ? EVP_CIPHER_mode(cipher) : 0;
    int pads = mode == EVP_CIPH_CBC_MODE || mode == EVP_CIPH_ECB_MODE;
    if (ctx && (EVP_CipherInit_ex(ctx, cipher, NULL, key, iv, encrypt) != 1 ||
                (pads && EVP_CIPHER_CTX_set_padding(ctx, 0) != 1))) {
        EVP_CIPHER_CTX_free(ctx);
        ctx = NULL;
    }
    return ctx;
}

qmpd_sectors *qmpd_sectors_new(const char *cipher, int encrypt, const uint8_t *key, uint32_t sector_size,
                               int iv_kind, const char *essiv_cipher, const uint8_t *essiv_key, int helper)
{
    qmpd_sectors *s = calloc(1, sizeof *s);
    if (!s)
        return NULL;
    s->sector_size = sector_size;
    s->iv_kind = iv_kind;
    s->data = context(cipher, encrypt, key, helper);
    if (s->data && iv_kind == IV_ESSIV)
        s->essiv = context(essiv_cipher, 1, essiv_key, helper);
    if (!s->data || (iv_kind == IV_ESSIV && !s->essiv))
        goto refuse;
    s->iv_length = EVP_CIPHER_iv_length(EVP_CIPHER_CTX_cipher(s->data));
    if (iv_kind != IV_NONE && (s->iv_length < 8 || s->iv_length > MAX_IV))
        goto refuse;
    if (iv_kind == IV_ESSIV &&
        EVP_CIPHER_block_size(EVP_CIPHER_CTX_cipher(s->essiv)) != s->iv_length)
        goto refuse;
    s->benbi_shift = s->iv_length == 16 ? 5 : 6;
    return s;
refuse:
    ERR_clear_error();
    qmpd_sectors_free(s);
    return NULL;
}

static uint64_t swapped(uint64_t value)
{
    uint64_t out = 0;
    for (int i = 0; i < 8; i++, value >>= 8)
        out = out << 8 | (value & 0xff);
    return out;
}

static int big_endian_host(void)
{
    const uint16_t one = 1;
    return *(const uint8_t *)&one == 0;
}

static void little(uint8_t *to, uint64_t value)
{
    if (big_endian_host())
        value = swapped(value);
    memcpy(to, &value, 8);
}

static void big(uint8_t *to, uint64_t value)
{
    if (!big_endian_host())
        value = swapped(value);
    memcpy(to, &value, 8);
}

static int make_iv(qmpd_sectors *s, uint64_t sector, uint8_t iv[MAX_IV])
{
    int written;
    memset(iv, 0, MAX_IV);
    switch (s->iv_kind) {
    case IV_PLAIN:
        little(iv, sector & 0xffffffff);
        break;
    case IV_PLAIN64:
        little(iv, sector);
        break;
    case IV_PLAIN64BE:
        big(iv + s->iv_length - 8, sector);
        break;
    case IV_BENBI:
        big(iv + s->iv_length - 8, (sector << s->benbi_shift) + 1);
        break;
    case IV_ESSIV:
        little(iv, sector);
        return EVP_CipherUpdate(s->essiv, iv, &written, iv, s->iv_length);
    default:
        break;
    }
    return 1;
}

int qmpd_sectors_run(qmpd_sectors *s, const qmpd_span *spans, size_t count)
{
    const uint32_t size = s->sector_size;
    uint8_t iv[MAX_IV];
    int written;
    for (size_t i = 0; i < count; i++) {
        const uint8_t *source = spans[i].source;
        uint8_t *target = spans[i].target;
        uint64_t sector = spans[i].sector;
        if (s->iv_kind == IV_NONE) {        /* sectors do not differ: one call for many */
            for (uint64_t left = spans[i].length; left;) {
                int now = left > (1u << 30) ? 1 << 30 : (int)left;
                if (EVP_CipherUpdate(s->data, target, &written, source, now) != 1)
                    goto failed;
                source += now, target += now, left -= now;
            }
            continue;
        }
        for (uint64_t left = spans[i].length; left >= size; left -= size) {
            if (make_iv(s, sector, iv) != 1 ||
                EVP_CipherInit_ex(s->data, NULL, NULL, NULL, iv, -1) != 1 ||
                EVP_CipherUpdate(s->data, target, &written, source, (int)size) != 1)
                goto failed;
            source += size, target += size, sector += size >> 9;
        }
    }
    return 0;
failed:
    ERR_clear_error();
    return -1;
}

int qmpd_sectors_one(qmpd_sectors *s, uint64_t sector, uint64_t length, const uint8_t *source, uint8_t *target)
{
    qmpd_span span = { sector, length, source, target };
    return qmpd_sectors_run(s, &span, 1);
}

typedef struct {
    uint64_t sector;            /* number of the first sector, as in a span; not used without cipher */
    uint64_t offset;            /* where it is in the file, bytes */
    uint64_t length;            /* bytes, a multiple of sector_size if there is a cipher */
    uint64_t at;                /* where it goes to or comes from, from `base` */
} qmpd_extent;

/* Large work is cut into pieces that the caller and one helper thread take in turn. The caller never waits for the
 * helper to wake, only for the piece it may be in: without a free processor it does the whole work alone. */
enum { PIECE = 1 << 16, ENOUGH = 1 << 17, SCRATCH = PIECE + PIECE / 2 };

typedef struct {
    qmpd_sectors *contexts[2];  /* the caller's and the helper's; NULL: no cipher, or no help */
    int fd;                     /* -1: spans, else extents of this file */
    int writing;                /* extents are written, `base` is not changed */
    const qmpd_span *spans;
    const qmpd_extent *extents;
    uint8_t *base;
    size_t count, limit;        /* items; the first that failed, or count */
    size_t item;                /* the next piece: item, and where in it */
    uint64_t from;
} qmpd_job;

static struct {
    pthread_mutex_t lock;
    pthread_cond_t work, rest;
    qmpd_job *job;              /* what the helper may take pieces of */
    int active, started;
} crew = { PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, PTHREAD_COND_INITIALIZER, NULL, 0, 0 };

/* Write a piece, through the scratch area if it is to be encrypted: it is small enough to stay in the cache, and on
 * pages of its own. */
static int write_piece(const qmpd_job *job, qmpd_sectors *s, const qmpd_extent *e, uint64_t from, uint64_t length)
{
    const uint8_t *source = job->base + e->at + from;
    if (s) {
        void *fresh;
        if (!s->scratch) {
            if (posix_memalign(&fresh, 4096, SCRATCH))
                return -1;
            s->scratch = fresh;
        }
        if (qmpd_sectors_one(s, e->sector + (from >> 9), length, source, s->scratch))
            return -1;
        source = s->scratch;
    }
    for (uint64_t done = 0; done < length;) {
        ssize_t put = pwrite(job->fd, source + done, length - done, (off_t)(e->offset + from + done));
        if (put <= 0)
            return -1;
        done += (uint64_t)put;
    }
    return 0;
}

static int do_piece(const qmpd_job *job, qmpd_sectors *s, size_t item, uint64_t from, uint64_t length)
{
    if (job->fd < 0) {
        const qmpd_span *span = &job->spans[item];
        return qmpd_sectors_one(s, span->sector + (from >> 9), length, span->source + from, span->target + from);
    }
    const qmpd_extent *e = &job->extents[item];
    if (job->writing)
        return write_piece(job, s, e, from, length);
    uint8_t *target = job->base + e->at + from;
    for (uint64_t done = 0; done < length;) {
        struct iovec part = { target + done, length - done };
        ssize_t got = preadv2(job->fd, &part, 1, (off_t)(e->offset + from + done), RWF_NOWAIT);
        if (got <= 0)
            return -1;
        done += (uint64_t)got;
    }
    return s ? qmpd_sectors_one(s, e->sector + (from >> 9), length, target, target) : 0;
}

/* Do pieces until there are none; crew.lock is held on entry and on return. */
static void do_pieces(qmpd_job *job, qmpd_sectors *s)
{
    while (job->item < job->limit) {
        size_t item = job->item;
        uint64_t from = job->from;
        uint64_t left = (job->fd < 0 ? job->spans[item].length : job->extents[item].length) - from;
        uint64_t length = left < PIECE + PIECE / 2 ? left : PIECE;
        if (length == left)
            job->item++, job->from = 0;
        else
            job->from += length;
        pthread_mutex_unlock(&crew.lock);
        int failed = do_piece(job, s, item, from, length);
        pthread_mutex_lock(&crew.lock);
        if (failed && item < job->limit)
            job->limit = item;
    }
}

static void *help_out(void *unused)
{
    (void)unused;
    pthread_mutex_lock(&crew.lock);
    for (;;) {
        while (!crew.job || crew.job->item >= crew.job->limit)
            pthread_cond_wait(&crew.work, &crew.lock);
        crew.active = 1;
        do_pieces(crew.job, crew.job->contexts[1]);
        crew.active = 0;
        pthread_cond_signal(&crew.rest);
    }
    return NULL;
}

static void start_helper(void)
{
    pthread_t thread;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);    /* signals are for the interpreter's threads */
    if (pthread_create(&thread, NULL, help_out, NULL) == 0)
        pthread_detach(thread);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    crew.started = 1;
}

/* Run a job; returns how many of its items are complete, in order. */
static size_t run_job(qmpd_job *job, uint64_t total)
{
    pthread_mutex_lock(&crew.lock);
    int helped = job->contexts[1] && total >= ENOUGH && !crew.job;
    if (helped) {
        if (!crew.started)
            start_helper();
        crew.job = job;
        pthread_cond_signal(&crew.work);
    }
    do_pieces(job, job->contexts[0]);
    if (helped) {
        while (crew.active)
            pthread_cond_wait(&crew.rest, &crew.lock);
        crew.job = NULL;
    }
    pthread_mutex_unlock(&crew.lock);
    return job->limit;
}

/* Transform spans, with `helper`, another context of the same key, on two threads; 0 or -1. */
int qmpd_sectors_share(qmpd_sectors *s, qmpd_sectors *helper, const qmpd_span *spans, size_t count)
{
    uint64_t total = 0;
    qmpd_job job = { { s, helper }, -1, 0, spans, NULL, NULL, count, count, 0, 0 };
    for (size_t i = 0; i < count; i++)
        total += spans[i].length;
    return run_job(&job, total) == count ? 0 : -1;
}

static int64_t run_extents(qmpd_job *job, uint64_t room)
{
    uint64_t total = 0;
    for (size_t i = 0; i < job->count; i++) {
        const qmpd_extent *e = &job->extents[i];
        if (e->at > room || e->length > room - e->at || e->offset > INT64_MAX - e->length)
            return -1;
        total += e->length;
    }
    return (int64_t)run_job(job, total);
}

/* Read extents that the page cache has, and decrypt them (s may be NULL: no cipher). Returns how many are
 * complete: the first that is not there, or not whole, ends it. -1 if an extent leaves the buffer. */
int64_t qmpd_read_extents(qmpd_sectors *s, qmpd_sectors *helper, int fd, const qmpd_extent *extents, size_t count,
                          uint8_t *base, uint64_t room)
{
    qmpd_job job = { { s, helper }, fd, 0, NULL, extents, base, count, count, 0, 0 };
    return run_extents(&job, room);
}

/* Encrypt extents (s may be NULL: no cipher) and write them to the page cache; `base` stays as it is. Returns how
 * many are complete, in order; of the others some bytes may have been written. -1 if an extent leaves the buffer. */
int64_t qmpd_write_extents(qmpd_sectors *s, qmpd_sectors *helper, int fd, const qmpd_extent *extents, size_t count,
                           const uint8_t *base, uint64_t room)
{
    qmpd_job job = { { s, helper }, fd, 1, NULL, extents, (uint8_t *)base, count, count, 0, 0 };
    return run_extents(&job, room);
}
"""

ffibuilder = FFI()
ffibuilder.cdef(CDEF)
ffibuilder.set_source(
    "qmpd.crypto._sectors",
    SOURCE,
    libraries=["crypto", "pthread"],
    extra_compile_args=["-O2"],
)


def build(root: Path) -> str:
    """Compile into the package below `root` (the folder that holds qmpd/) and return the path.

    Intermediate files go to a `build/` folder beside the package. Raises what distutils raises
    where there is no compiler.
    """
    work = root / "build" / "sectors"
    work.mkdir(parents=True, exist_ok=True)
    made = Path(ffibuilder.compile(tmpdir=str(work), verbose=False))
    target = root / "qmpd" / "crypto" / made.name
    fresh = target.with_name(f".{target.name}.{os.getpid()}")
    fresh.write_bytes(made.read_bytes())
    fresh.chmod(0o755)
    fresh.replace(target)  # a running process keeps its mapping of the old file
    return str(target)


if __name__ == "__main__":
    try:
        sys.stdout.write(build(Path(__file__).resolve().parents[2]) + "\n")
    except (VerificationError, ImportError, OSError) as error:
        sys.exit(f"cannot build the sector loop, the reference engine will be used: {error}")
