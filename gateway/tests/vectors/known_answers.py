#!/usr/bin/env python3
"""Prints src/crypto/known_answers.txt: the ICVs that OpenSSL computes for the packets that every start tries.

As every suite authenticates its ciphertext, a right ICV means a right ciphertext. Needs the `cryptography`
package, which wraps OpenSSL and so shares no code with the gateway's providers.
"""
import hashlib
import hmac

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

SEQ_HI = bytes.fromhex("01020304")
MACS = {
    "hmac-sha1-96": (hashlib.sha1, 20, 12),
    "hmac-sha2-256-128": (hashlib.sha256, 32, 16),
    "hmac-sha2-384-192": (hashlib.sha384, 48, 24),
    "hmac-sha2-512-256": (hashlib.sha512, 64, 32),
}


def pattern(n, tag):
    return bytes((i * 31 + i // 256 + tag) & 0xFF for i in range(n))


def head(esn):
    spi, seq = pattern(8, 3)[:4], pattern(8, 3)[4:]
    return spi + (SEQ_HI if esn else b"") + seq


def aead(kind, bits, icv, body, esn):
    key = pattern(bits // 8 + 4, 1)
    key, salt = key[:-4], key[-4:]
    packet = pattern(16 + body, 3)
    iv, text = packet[8:16], packet[16:]
    box = ChaCha20Poly1305(key) if kind == "chacha" else AESGCM(key)
    if kind == "gmac":
        return box.encrypt(salt + iv, b"", head(esn) + iv + text)
    return box.encrypt(salt + iv, text, head(esn))[-16:][:icv]


def chained(cipher, bits, mac, body, esn):
    digest, auth_len, icv = MACS[mac]
    ivlen = {"null": 0, "cbc": 16, "ctr": 8}[cipher]
    packet = pattern(8 + ivlen + body, 3)
    iv, text = packet[8 : 8 + ivlen], packet[8 + ivlen :]
    if cipher == "cbc":
        c = Cipher(algorithms.AES(pattern(bits // 8, 1)), modes.CBC(iv))
    elif cipher == "ctr":
        key = pattern(bits // 8 + 4, 1)
        c = Cipher(algorithms.AES(key[:-4]), modes.CTR(key[-4:] + iv + b"\0\0\0\1"))
    if cipher != "null":
        e = c.encryptor()
        text = e.update(text) + e.finalize()
    sealed = packet[: 8 + ivlen] + text + (SEQ_HI if esn else b"")
    return hmac.new(pattern(auth_len, 2), sealed, digest).digest()[:icv]


def answers():
    for bits in (128, 192, 256):
        for icv in (8, 12, 16):
            yield f"aes-{bits}-gcm-{icv}", lambda n, e, b=bits, i=icv: aead("gcm", b, i, n, e)
        yield f"aes-{bits}-gmac", lambda n, e, b=bits: aead("gmac", b, 16, n, e)
    yield "chacha20-poly1305", lambda n, e: aead("chacha", 256, 16, n, e)
    for mac in MACS:
        yield f"null+{mac}", lambda n, e, m=mac: chained("null", 0, m, n, e)
        for bits in (128, 192, 256):
            for c in ("cbc", "ctr"):
                yield f"aes-{bits}-{c}+{mac}", lambda n, e, c=c, b=bits, m=mac: chained(c, b, m, n, e)


print("# suite, sequence bits, body bytes, ICV; made by tests/vectors/known_answers.py")
for name, f in answers():
    for esn in (False, True):
        for body in (16, 240, 1024):
            print(name, 64 if esn else 32, body, f(body, esn).hex())
