"""The gateway's cipher suites as scapy's IPsec layer knows them."""

from dataclasses import dataclass

from cryptography.hazmat.primitives.ciphers import algorithms, modes
from scapy.layers import ipsec

# Scapy's own AES-GCM entry always has a 16-byte ICV; RFC 4106 allows 8 and 12 too.
for icv in (8, 12):
    ipsec.CRYPT_ALGOS[f"AES-GCM-{icv}"] = ipsec.CryptAlgo(
        f"AES-GCM-{icv}",
        cipher=algorithms.AES,
        mode=modes.GCM,
        block_size=1,
        iv_size=8,
        icv_size=icv,
        salt_size=4,
        format_mode_iv=lambda sa, iv, **_: sa.crypt_salt + iv,
    )


@dataclass(frozen=True)
class Suite:
    """One suite: its name in SA files, scapy's names, key lengths in bytes."""

    name: str
    crypt: str
    key: int
    auth: str | None = None
    auth_key: int = 0
    weak: bool = False


def all_suites():
    """Every suite of the gateway; scapy speaks them all."""
    aes = {128: 16, 192: 24, 256: 32}
    for bits, size in aes.items():
        yield Suite(f"aes-{bits}-gcm-8", "AES-GCM-8", size + 4, weak=True)
        yield Suite(f"aes-{bits}-gcm-12", "AES-GCM-12", size + 4)
        yield Suite(f"aes-{bits}-gcm-16", "AES-GCM", size + 4)
        yield Suite(f"aes-{bits}-gmac", "AES-NULL-GMAC", size + 4)
    yield Suite("chacha20-poly1305", "CHACHA20-POLY1305", 36)
    ciphers = [("null", "NULL", 0)]
    ciphers += [(f"aes-{bits}-cbc", "AES-CBC", size) for bits, size in aes.items()]
    ciphers += [(f"aes-{bits}-ctr", "AES-CTR", size + 4) for bits, size in aes.items()]
    macs = [
        ("hmac-sha1-96", "HMAC-SHA1-96", 20),
        ("hmac-sha2-256-128", "SHA2-256-128", 32),
        ("hmac-sha2-384-192", "SHA2-384-192", 48),
        ("hmac-sha2-512-256", "SHA2-512-256", 64),
    ]
    for cipher, crypt, key in ciphers:
        for mac, auth, auth_key in macs:
            yield Suite(f"{cipher}+{mac}", crypt, key, auth, auth_key)
