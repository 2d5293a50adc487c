/* Contexts and jobs that Rust and the shim share. Sizes come from the installed header, never by hand. */
#ifndef ESPLANADE_SHIM_H
#define ESPLANADE_SHIM_H

#include <intel-ipsec-mb.h>
#include <stddef.h>
#include <stdint.h>

#if IMB_VERSION_NUM < IMB_VERSION(1, 3, 0)
#error "intel-ipsec-mb 1.3 or newer is needed"
#endif

/* Expanded key of one SA for GCM or GMAC. The small fields share the last line of the hash keys. */
struct esp_gcm {
        struct gcm_key_data key;
        uint8_t salt[4];
        uint8_t kind; /* 0..2: GCM 128, 192, 256; 3..5: GMAC likewise */
        uint8_t tag_len;
        uint8_t esn;
};

_Static_assert(sizeof(struct esp_gcm) <= 64 * ESPLANADE_CONTEXT_LINES, "context larger than Rust's");
_Static_assert(_Alignof(struct esp_gcm) <= 64, "context wants more alignment than Rust gives");

/* What a scheduler context does; Rust's `Shape`. */
struct esp_shape {
        uint8_t salt[4];
        uint8_t cipher; /* enum esp_cipher */
        uint8_t key_len;
        uint8_t mac; /* enum esp_mac */
        uint8_t iv_len;
        uint8_t icv_len;
        uint8_t esn;
        uint8_t outbound;
};

/* Expanded key of one SA for the multi-buffer scheduler. */
struct esp_chain {
        _Alignas(16) uint8_t schedule[15 * 16]; /* of the one direction; ChaCha20: the key */
        uint8_t ipad[64];
        uint8_t opad[64];
        struct esp_shape shape;
};

_Static_assert(sizeof(struct esp_chain) <= 384, "context larger than Rust's");

enum esp_cipher { ESP_NULL, ESP_CBC, ESP_CTR, ESP_CHACHA };
enum esp_mac { ESP_SHA1, ESP_SHA256, ESP_SHA384, ESP_SHA512, ESP_POLY1305 };

/* One packet, from SPI to ICV. */
struct esp_job {
        const void *ctx;
        uint8_t *esp;
        uint32_t len;
        uint32_t seq_hi;
};

#endif
