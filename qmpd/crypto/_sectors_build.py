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
int qmpd_key_length(const char *cipher);
qmpd_sectors *qmpd_sectors_new(const char *cipher, int encrypt, const uint8_t *key, uint32_t sector_size,
                               int iv_kind, const char *essiv_cipher, const uint8_t *essiv_key);
int qmpd_sectors_run(qmpd_sectors *s, const qmpd_span *spans, size_t count);
int qmpd_sectors_one(qmpd_sectors *s, uint64_t sector, uint64_t length, const uint8_t *source, uint8_t *target);
void qmpd_sectors_free(qmpd_sectors *s);
const char *qmpd_openssl_version(void);
"""

SOURCE = """
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
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
        OPENSSL_cleanse(s, sizeof *s);
        free(s);
    }
}

static EVP_CIPHER_CTX *context(const char *name, int encrypt, const uint8_t *key)
{
    const EVP_CIPHER *cipher = EVP_get_cipherbyname(name);
    EVP_CIPHER_CTX *ctx = cipher ? EVP_CIPHER_CTX_new() : NULL;
    static const uint8_t iv[MAX_IV];
    if (ctx && (EVP_CipherInit_ex(ctx, cipher, NULL, key, iv, encrypt) != 1 ||
                EVP_CIPHER_CTX_set_padding(ctx, 0) != 1)) {
        EVP_CIPHER_CTX_free(ctx);
        ctx = NULL;
    }
    return ctx;
}

qmpd_sectors *qmpd_sectors_new(const char *cipher, int encrypt, const uint8_t *key, uint32_t sector_size,
                               int iv_kind, const char *essiv_cipher, const uint8_t *essiv_key)
{
    qmpd_sectors *s = calloc(1, sizeof *s);
    if (!s)
        return NULL;
    s->sector_size = sector_size;
    s->iv_kind = iv_kind;
    s->data = context(cipher, encrypt, key);
    if (s->data && iv_kind == IV_ESSIV)
        s->essiv = context(essiv_cipher, 1, essiv_key);
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
"""

ffibuilder = FFI()
ffibuilder.cdef(CDEF)
ffibuilder.set_source(
    "qmpd.crypto._sectors",
    SOURCE,
    libraries=["crypto"],
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
