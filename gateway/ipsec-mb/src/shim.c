/*
 * ESP over intel-ipsec-mb: runs of packets in, a bit per packet out.
 *
 * GCM and GMAC call the library's functions directly: one packet fills the machine. CBC, CTR or NULL with
 * HMAC, and ChaCha20-Poly1305, go through the scheduler, which works on packets of several SAs at once. Nothing
 * stays in the scheduler when a call returns, so no pointer outlives its call.
 */
#include "shim.h"

#include <emmintrin.h>
#include <stdatomic.h>
#include <string.h>

#define MAX_RUN 64

/* The library's entry points; written by esp_mb_start, to be read once `started` is seen. */
static struct {
        aes_gcm_enc_dec_t seal[3], open[3];
        aes_gmac_init_t gmac_init[3];
        aes_gmac_update_t gmac_update[3];
        aes_gmac_finalize_t gmac_final[3];
        aes_gcm_pre_t expand[3];
} mb;

static atomic_int started;

IMB_MGR *esp_mb_manager(void)
{
        IMB_MGR *m = alloc_mb_mgr(0);

        if (m == NULL)
                return NULL;
        init_mb_mgr_auto(m, NULL);
        if (imb_get_errno(m) != 0) {
                free_mb_mgr(m);
                return NULL;
        }
        return m;
}

void esp_mb_manager_free(IMB_MGR *m)
{
        free_mb_mgr(m);
}

/*
 * 0: ready. 1: no memory, or the CPU lacks what the library needs. 2: older library than the header that
 * this was built with. 3: the library's own self-test failed.
 */
int esp_mb_start(uint64_t *features, uint32_t *arch, uint32_t *version)
{
        IMB_MGR *m;

        *version = imb_get_version();
        if (*version < IMB_VERSION_NUM)
                return 2;
        m = esp_mb_manager();
        if (m == NULL)
                return 1;
        *features = m->features;
        *arch = m->used_arch;
        if ((m->features & IMB_FEATURE_SELF_TEST) && !(m->features & IMB_FEATURE_SELF_TEST_PASS)) {
                free_mb_mgr(m);
                return 3;
        }
        mb.seal[0] = m->gcm128_enc;
        mb.seal[1] = m->gcm192_enc;
        mb.seal[2] = m->gcm256_enc;
        mb.open[0] = m->gcm128_dec;
        mb.open[1] = m->gcm192_dec;
        mb.open[2] = m->gcm256_dec;
        mb.gmac_init[0] = m->gmac128_init;
        mb.gmac_init[1] = m->gmac192_init;
        mb.gmac_init[2] = m->gmac256_init;
        mb.gmac_update[0] = m->gmac128_update;
        mb.gmac_update[1] = m->gmac192_update;
        mb.gmac_update[2] = m->gmac256_update;
        mb.gmac_final[0] = m->gmac128_finalize;
        mb.gmac_final[1] = m->gmac192_finalize;
        mb.gmac_final[2] = m->gmac256_finalize;
        mb.expand[0] = m->gcm128_pre;
        mb.expand[1] = m->gcm192_pre;
        mb.expand[2] = m->gcm256_pre;
        free_mb_mgr(m);
        atomic_store_explicit(&started, 1, memory_order_release);
        return 0;
}

uint64_t esp_mb_feature_vaes(void)
{
        return IMB_FEATURE_VAES | IMB_FEATURE_VPCLMULQDQ | IMB_FEATURE_AVX512_SKX;
}

/* Equal over `len` bytes? Time depends on `len` alone. */
static int same(const uint8_t *a, const uint8_t *b, size_t len)
{
        uint32_t diff = 0;

        for (size_t i = 0; i < len; i++)
                diff |= (uint32_t) (a[i] ^ b[i]);
        /* Keeps the compiler from leaving the loop early. */
        __asm__ volatile("" : "+r"(diff));
        return diff == 0;
}

/* Tags of 8, 12 and 16 bytes without a loop. */
static int same_tag(const uint8_t *a, const uint8_t *b, size_t len)
{
        uint64_t x, y, p, q, diff;

        memcpy(&x, a, 8);
        memcpy(&y, b, 8);
        /* The last 8 bytes; overlaps the first for 8 and 12. */
        memcpy(&p, a + len - 8, 8);
        memcpy(&q, b + len - 8, 8);
        diff = (x ^ y) | (p ^ q);
        __asm__ volatile("" : "+r"(diff));
        return diff == 0;
}

void esp_mb_gcm_expand(struct esp_gcm *c, const uint8_t *key, const uint8_t *salt, uint8_t kind,
                       uint8_t tag_len, uint8_t esn)
{
        mb.expand[kind % 3](key, &c->key);
        memcpy(c->salt, salt, 4);
        c->kind = kind;
        c->tag_len = tag_len;
        c->esn = esn;
}

/* Round keys, and as many powers of the hash key as `len` bytes use: the first powers are stored last. */
static inline void fetch_key(const struct esp_gcm *c, uint32_t len)
{
        const char *p = (const char *) c;
        const char *end = p + sizeof(struct gcm_key_data);
        size_t powers = len / 16 + 3;

        for (size_t at = 0; at < 4 * 64; at += 64)
                _mm_prefetch(p + at, _MM_HINT_T0);
        if (powers > 48)
                powers = 48;
        for (const char *q = end - 16 * powers; q < end; q += 64)
                _mm_prefetch(q, _MM_HINT_T0);
        _mm_prefetch(end - 1, _MM_HINT_T0);
}

/* 16 bytes in one store, so that the library's loads are forwarded from it. */
static inline __m128i nonce(const struct esp_gcm *c, const uint8_t *esp)
{
        uint32_t salt;

        memcpy(&salt, c->salt, 4);
        return _mm_or_si128(_mm_slli_si128(_mm_loadl_epi64((const __m128i *) (esp + 8)), 4),
                            _mm_cvtsi32_si128((int) salt));
}

static inline __m128i aad_esn(const uint8_t *esp, uint32_t seq_hi)
{
        uint32_t spi, seq;

        memcpy(&spi, esp, 4);
        memcpy(&seq, esp + 4, 4);
        return _mm_set_epi32(0, (int) seq, (int) __builtin_bswap32(seq_hi), (int) spi);
}

static void gmac(const struct esp_gcm *c, const struct esp_job *j, uint8_t *tag)
{
        struct gcm_context_data s;
        unsigned k = c->kind - 3u;
        uint64_t body = j->len - c->tag_len;
        uint8_t iv[16];

        _mm_storeu_si128((__m128i *) iv, nonce(c, j->esp));
        mb.gmac_init[k](&c->key, &s, iv, 12);
        if (c->esn) {
                uint8_t aad[16];

                _mm_storeu_si128((__m128i *) aad, aad_esn(j->esp, j->seq_hi));
                mb.gmac_update[k](&c->key, &s, aad, 12);
                mb.gmac_update[k](&c->key, &s, j->esp + 8, body - 8);
        } else {
                mb.gmac_update[k](&c->key, &s, j->esp, body);
        }
        mb.gmac_final[k](&c->key, &s, tag, 16);
}

static inline void gcm(const aes_gcm_enc_dec_t f, const struct esp_gcm *c, const struct esp_job *j,
                       struct gcm_context_data *s, uint8_t *tag)
{
        _Alignas(16) uint8_t iv[16], aad[16];
        uint8_t *body = j->esp + 16;
        uint64_t len = j->len - 16 - c->tag_len;

        _mm_store_si128((__m128i *) iv, nonce(c, j->esp));
        if (c->esn) {
                _mm_store_si128((__m128i *) aad, aad_esn(j->esp, j->seq_hi));
                f(&c->key, s, body, body, len, iv, aad, 12, tag, c->tag_len);
        } else {
                f(&c->key, s, body, body, len, iv, j->esp, 8, tag, c->tag_len);
        }
}

/* Contexts may hold any bytes, so what steers the code is checked: started, kind known, tag 8, 12 or 16, fits. */
static inline int gcm_usable(const struct esp_gcm *c, const struct esp_job *j)
{
        return c->kind < 6 && c->tag_len < 32 && ((UINT32_C(0x11100) >> c->tag_len) & 1) != 0 &&
               j->len >= 16u + c->tag_len &&
               atomic_load_explicit(&started, memory_order_acquire) != 0;
}

/* Jobs ahead whose memory is asked for: about the latency of DRAM in small packets. */
#define AHEAD 3

static inline void fetch_job(const struct esp_job *j)
{
        fetch_key(j->ctx, j->len);
        _mm_prefetch((const char *) j->esp, _MM_HINT_T0);
        _mm_prefetch((const char *) j->esp + 64, _MM_HINT_T0);
}

static inline uint64_t gcm_seal_one(const struct esp_job *j)
{
        struct gcm_context_data s;
        const struct esp_gcm *c = j->ctx;
        uint8_t *tag;

        if (!gcm_usable(c, j))
                return 0;
        tag = j->esp + j->len - c->tag_len;
        if (c->kind < 3)
                gcm(mb.seal[c->kind], c, j, &s, tag);
        else
                gmac(c, j, tag);
        return 1;
}

static inline uint64_t gcm_open_one(const struct esp_job *j)
{
        struct gcm_context_data s;
        const struct esp_gcm *c = j->ctx;
        uint8_t tag[16];

        if (!gcm_usable(c, j))
                return 0;
        if (c->kind < 3)
                gcm(mb.open[c->kind], c, j, &s, tag);
        else
                gmac(c, j, tag);
        return (uint64_t) same_tag(tag, j->esp + j->len - c->tag_len, c->tag_len);
}

uint64_t esp_mb_gcm_seal(const struct esp_job *jobs, unsigned n)
{
        uint64_t ok = 0;

        for (unsigned i = 1; i < n && i < AHEAD; i++)
                fetch_job(&jobs[i]);
        for (unsigned i = 0; i < n; i++) {
                if (i + AHEAD < n)
                        fetch_job(&jobs[i + AHEAD]);
                ok |= gcm_seal_one(&jobs[i]) << i;
        }
        return ok;
}

uint64_t esp_mb_gcm_open(const struct esp_job *jobs, unsigned n)
{
        uint64_t ok = 0;

        for (unsigned i = 1; i < n && i < AHEAD; i++)
                fetch_job(&jobs[i]);
        for (unsigned i = 0; i < n; i++) {
                if (i + AHEAD < n)
                        fetch_job(&jobs[i + AHEAD]);
                ok |= gcm_open_one(&jobs[i]) << i;
        }
        return ok;
}

/* A run of one, in registers. */
uint64_t esp_mb_gcm_one(const void *ctx, uint8_t *esp, uint32_t len, uint32_t seq_hi, int seal)
{
        const struct esp_job j = {ctx, esp, len, seq_hi};

        return seal ? gcm_seal_one(&j) : gcm_open_one(&j);
}

/* The bare AEAD, for test vectors whose associated data no ESP packet carries. */
void esp_mb_gcm_raw(const struct esp_gcm *c, const uint8_t *iv, const uint8_t *aad, size_t aad_len,
                    uint8_t *data, size_t len, uint8_t *tag, int seal)
{
        struct gcm_context_data s;
        const aes_gcm_enc_dec_t f = seal ? mb.seal[c->kind % 3] : mb.open[c->kind % 3];

        f(&c->key, &s, data, data, len, iv, aad, aad_len, tag, c->tag_len);
}

uint8_t esp_mb_gcm_tag_len(const struct esp_gcm *c)
{
        return c->tag_len;
}

static void hmac_key(IMB_MGR *m, struct esp_chain *c, const uint8_t *key, size_t len)
{
        const size_t block = c->shape.mac < ESP_SHA384 ? 64 : 128;
        hash_one_block_t hash;
        uint8_t pad[128];

        switch (c->shape.mac) {
        case ESP_SHA1:
                hash = m->sha1_one_block;
                break;
        case ESP_SHA256:
                hash = m->sha256_one_block;
                break;
        case ESP_SHA384:
                hash = m->sha384_one_block;
                break;
        default:
                hash = m->sha512_one_block;
        }
        memset(pad, 0x36, block);
        for (size_t i = 0; i < len; i++)
                pad[i] ^= key[i];
        hash(pad, c->ipad);
        for (size_t i = 0; i < block; i++)
                pad[i] ^= 0x36 ^ 0x5c;
        hash(pad, c->opad);
        explicit_bzero(pad, sizeof(pad));
}

/* `auth_len` is at most 64, the longest key that RFC 4868 has. */
void esp_mb_chain_expand(IMB_MGR *m, struct esp_chain *c, const struct esp_shape *shape,
                         const uint8_t *enc, const uint8_t *auth, size_t auth_len)
{
        _Alignas(16) uint8_t encrypt[15 * 16] = {0}, decrypt[15 * 16] = {0};

        c->shape = *shape;
        if (c->shape.cipher == ESP_CHACHA) {
                memcpy(c->schedule, enc, 32);
                return;
        }
        hmac_key(m, c, auth, auth_len);
        if (c->shape.cipher == ESP_NULL)
                return;
        switch (c->shape.key_len) {
        case 16:
                m->keyexp_128(enc, encrypt, decrypt);
                break;
        case 24:
                m->keyexp_192(enc, encrypt, decrypt);
                break;
        default:
                m->keyexp_256(enc, encrypt, decrypt);
        }
        /* Counter mode encrypts in both directions. */
        memcpy(c->schedule, c->shape.cipher == ESP_CTR || c->shape.outbound ? encrypt : decrypt,
               sizeof(c->schedule));
        explicit_bzero(encrypt, sizeof(encrypt));
        explicit_bzero(decrypt, sizeof(decrypt));
}

/* What a packet in the scheduler needs until it comes back. */
struct slot {
        _Alignas(16) uint8_t iv[16];
        uint8_t aad[16];
        uint8_t tag[64];
        uint8_t icv[32]; /* as received */
        const struct esp_job *job;
};

static void fill(IMB_JOB *b, struct slot *s, const struct esp_job *j, int seal)
{
        static const IMB_HASH_ALG hash[] = {IMB_AUTH_HMAC_SHA_1, IMB_AUTH_HMAC_SHA_256,
                                            IMB_AUTH_HMAC_SHA_384, IMB_AUTH_HMAC_SHA_512,
                                            IMB_AUTH_CHACHA20_POLY1305};
        const struct esp_chain *c = j->ctx;
        const uint32_t head = 8u + c->shape.iv_len;
        uint8_t *icv = j->esp + j->len - c->shape.icv_len;
        const uint64_t body = j->len - head - c->shape.icv_len; /* usable() checked */

        s->job = j;
        b->user_data = s;
        b->src = j->esp;
        b->dst = j->esp + head;
        b->enc_keys = c->schedule;
        b->dec_keys = c->schedule;
        b->key_len_in_bytes = c->shape.key_len;
        b->cipher_start_src_offset_in_bytes = head;
        b->msg_len_to_cipher_in_bytes = body;
        b->hash_start_src_offset_in_bytes = 0;
        b->msg_len_to_hash_in_bytes = head + body;
        b->iv = s->iv;
        b->cipher_direction = seal ? IMB_DIR_ENCRYPT : IMB_DIR_DECRYPT;
        b->chain_order = seal ? IMB_ORDER_CIPHER_HASH : IMB_ORDER_HASH_CIPHER;
        b->hash_alg = hash[c->shape.mac];
        b->auth_tag_output = s->tag;
        b->auth_tag_output_len_in_bytes = c->shape.icv_len;
        b->u.HMAC._hashed_auth_key_xor_ipad = c->ipad;
        b->u.HMAC._hashed_auth_key_xor_opad = c->opad;
        switch (c->shape.cipher) {
        case ESP_NULL:
                b->cipher_mode = IMB_CIPHER_NULL;
                b->iv_len_in_bytes = 0;
                break;
        case ESP_CBC:
                b->cipher_mode = IMB_CIPHER_CBC;
                b->iv_len_in_bytes = 16;
                b->iv = j->esp + 8;
                break;
        case ESP_CTR:
                /* The library appends the block counter, from 1. */
                b->cipher_mode = IMB_CIPHER_CNTR;
                b->iv_len_in_bytes = 12;
                memcpy(s->iv, c->shape.salt, 4);
                memcpy(s->iv + 4, j->esp + 8, 8);
                break;
        default:
                b->cipher_mode = IMB_CIPHER_CHACHA20_POLY1305;
                b->iv_len_in_bytes = 12;
                memcpy(s->iv, c->shape.salt, 4);
                memcpy(s->iv + 4, j->esp + 8, 8);
                b->hash_start_src_offset_in_bytes = head;
                b->msg_len_to_hash_in_bytes = body;
                b->u.CHACHA20_POLY1305.aad = s->aad;
                b->u.CHACHA20_POLY1305.aad_len_in_bytes = c->shape.esn ? 12 : 8;
                b->u.CHACHA20_POLY1305.ctx = NULL;
                if (c->shape.esn)
                        _mm_storeu_si128((__m128i *) s->aad, aad_esn(j->esp, j->seq_hi));
                else
                        memcpy(s->aad, j->esp, 8);
        }
        if (!seal)
                memcpy(s->icv, icv, c->shape.icv_len);
        if (c->shape.esn && c->shape.mac != ESP_POLY1305) {
                /* RFC 4303 2.8: the high half follows the packet, where the ICV will be or was. */
                const uint32_t hi = __builtin_bswap32(j->seq_hi);

                memcpy(icv, &hi, 4);
                b->msg_len_to_hash_in_bytes += 4;
        }
}

static int usable(const struct esp_job *j, int seal)
{
        const struct esp_chain *c = j->ctx;
        const uint32_t fixed = 8u + c->shape.iv_len + c->shape.icv_len;

        if (c->shape.icv_len == 0 || j->len <= fixed || c->shape.outbound != (uint8_t) seal)
                return 0;
        return c->shape.cipher != ESP_CBC || (j->len - fixed) % 16 == 0;
}

static uint64_t take(const IMB_JOB *b, const struct esp_job *jobs, int seal)
{
        const struct slot *s = b->user_data;
        const struct esp_job *j = s->job;
        const struct esp_chain *c = j->ctx;
        uint8_t *icv = j->esp + j->len - c->shape.icv_len;
        uint64_t ok = b->status == IMB_STATUS_COMPLETED;

        if (seal) {
                memcpy(icv, s->tag, c->shape.icv_len);
        } else {
                ok &= (uint64_t) same(s->tag, s->icv, c->shape.icv_len);
                memcpy(icv, s->icv, c->shape.icv_len);
        }
        return ok << (j - jobs);
}

uint64_t esp_mb_chain_run(IMB_MGR *m, const struct esp_job *jobs, unsigned n, int seal)
{
        struct slot slots[MAX_RUN];
        uint64_t ok = 0;
        IMB_JOB *b;

        if (n > MAX_RUN)
                n = MAX_RUN;
        for (unsigned i = 0; i < n; i++) {
                if (!usable(&jobs[i], seal))
                        continue;
                b = IMB_GET_NEXT_JOB(m);
                fill(b, &slots[i], &jobs[i], seal);
                for (b = IMB_SUBMIT_JOB_NOCHECK(m); b != NULL; b = IMB_GET_COMPLETED_JOB(m))
                        ok |= take(b, jobs, seal);
        }
        while ((b = IMB_FLUSH_JOB(m)) != NULL)
                ok |= take(b, jobs, seal);
        return ok;
}
