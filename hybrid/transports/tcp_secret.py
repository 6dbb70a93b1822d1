"""What two ends of a TCP connection prove to each other, and the keys they then seal their frames with.

The only file that imports `cryptography`. Both ends know the job's token, which never travels: each proves it by a
MAC over all that both have said, random numbers of both among it, so that no proof is of use a second time. The keys
come from the token and from a secret that is fresh for each connection (X25519): who learns the token later cannot
read what was recorded before. Pure but for random numbers: no sockets, no clock. May import only `errors`.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from functools import cache
from pathlib import Path
from typing import final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from hybrid.errors import ProtocolError

TAG_BYTES = 16
"""By how much a sealed piece is longer than what is in it."""
NONCE_BYTES = 32
DIALER, LISTENER = b"hybrid tcp 1: the end that dials", b"hybrid tcp 1: the end that listens"


@final
class Half:
    """One end's part of a fresh secret; of use once."""

    def __init__(self) -> None:
        self._private = X25519PrivateKey.generate()
        self.public = self._private.public_key().public_bytes_raw()
        self.nonce = secrets.token_bytes(NONCE_BYTES)

    def join(self, public: bytes) -> bytes:
        """Return the secret that both ends have.

        Raises:
            ProtocolError: the other half is none.
        """
        try:
            return self._private.exchange(X25519PublicKey.from_public_bytes(public))
        except ValueError:
            raise ProtocolError("the peer's half of the secret is none", value=public[:8]) from None


def proof(token: bytes, role: bytes, said: bytes) -> bytes:
    """Return what only who knows the token can say of a talk in which `said` was said."""
    return hmac.digest(hashlib.sha256(b"hybrid tcp 1: proof" + token).digest(), role + said, "sha256")


def proves(mac: bytes, token: bytes, role: bytes, said: bytes) -> bool:
    """Return whether `mac` is that proof; takes the same time whatever is wrong with it."""
    return hmac.compare_digest(mac, proof(token, role, said))


def seal_of(role: bytes, token: bytes, shared: bytes, said: bytes) -> Seal:
    """Return what seals, or opens, the frames of the end that has `role`."""
    salt = hashlib.sha256(said).digest()
    return Seal(HKDF(algorithm=SHA256(), length=32, salt=salt, info=role).derive(token + shared))


@cache
def _boot() -> bytes:
    try:
        namespace = Path("/proc/self/ns/net").stat().st_ino
        return Path("/proc/sys/kernel/random/boot_id").read_bytes() + namespace.to_bytes(8, "big")
    except OSError:
        return secrets.token_bytes(32)


def host_name(token: bytes) -> bytes:
    """Return a name of this running kernel and network namespace; strangers learn nothing from it."""
    return hmac.digest(hashlib.sha256(b"hybrid tcp 1: host" + token).digest(), _boot(), "sha256")


@final
class Seal:
    """AES-256-GCM for one direction of one connection; the number of the piece is its nonce.

    A piece that was altered, left out, repeated or put elsewhere does not open.
    """

    def __init__(self, key: bytes) -> None:
        self._cipher, self._next = AESGCM(key), 0

    def close_into(self, target: memoryview, plain: memoryview | bytes | bytearray, beside: bytes = b"") -> None:
        """Write the sealed piece, `TAG_BYTES` longer than `plain`; `beside` is sealed with it and not written."""
        self._cipher.encrypt_into(self._number(), plain, beside, target)

    def open_into(self, target: memoryview, sealed: memoryview, beside: bytes = b"") -> None:
        """Write what is in the sealed piece.

        Raises:
            ProtocolError: it is not the next piece of the peer; `target` may then hold anything.
        """
        try:
            self._cipher.decrypt_into(self._number(), sealed, beside, target)
        except InvalidTag:
            raise ProtocolError("a sealed frame is not the peer's next: altered, repeated or out of turn") from None

    def _number(self) -> bytes:
        self._next += 1
        return self._next.to_bytes(12, "big")
