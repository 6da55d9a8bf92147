"""Ed25519 signatures over a manifest: whose versions are served.

The seal of a version is the 64 bytes of a signature over the bytes of `manifest.json`, beside it
in `manifest.sig`; the manifest holds the digests of all other files. Keys are PEM files as openssl
makes them, and a seal can be checked without driftgate:
`openssl pkeyutl -verify -pubin -inkey publish.pub -rawin -in manifest.json -sigfile manifest.sig`.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from registry import manifest, store
from registry.errors import RegistryError, UntrustedError
from registry.manifest import Manifest

if TYPE_CHECKING:  # imported where a key is used: most commands use none
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey as PrivateKey
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey as PublicKey

_PEM = re.compile(rb"-----BEGIN PUBLIC KEY-----.+?-----END PUBLIC KEY-----", re.DOTALL)
_SEAL_BYTES = 64
_KEY_BYTES_MAX = 1 << 20


@dataclass(frozen=True)
class Keys:
    """Public keys of those whose versions are served."""

    keys: "tuple[PublicKey, ...]"

    def check(self, data: bytes, seal: bytes) -> None:
        """See that one of the keys made this seal of these bytes.

        Raises
        ------
        UntrustedError : none did.
        """
        from cryptography.exceptions import InvalidSignature  # noqa: PLC0415  as above

        for key in self.keys:
            try:
                key.verify(seal, data)
            except InvalidSignature:
                continue
            return
        raise UntrustedError(
            "manifest.sig was made by none of the trusted keys, or manifest.json was changed"
        )


def read_keys(path: Path) -> Keys:
    """Public keys of a PEM file with one or several, or of all `.pub` and `.pem` files in a folder.

    Raises
    ------
    RegistryError : there is none, or one is no Ed25519 public key.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (  # noqa: PLC0415  as above
        Ed25519PublicKey,
    )
    from cryptography.hazmat.primitives.serialization import (  # noqa: PLC0415  as above
        load_pem_public_key,
    )

    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in {".pub", ".pem"})
    found: list[Ed25519PublicKey] = []
    for file in files:
        for text in _PEM.findall(_read(file)):
            try:
                key = load_pem_public_key(text)
            except ValueError:
                raise RegistryError(f"{file.name}: holds no public key that can be read") from None
            if not isinstance(key, Ed25519PublicKey):
                raise RegistryError(f"{file.name}: is no Ed25519 key")
            found.append(key)
    if not found:
        raise RegistryError(
            f"{path.name}: holds no public key in PEM"
            " (openssl pkey -in publish.key -pubout -out publish.pub)"
        )
    return Keys(tuple(found))


def read_private_key(file: Path) -> "PrivateKey":
    """The private key to sign with; a PEM file that nobody else may read.

    Raises
    ------
    RegistryError : it is none, is encrypted, or others may read it.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (  # noqa: PLC0415  as above
        Ed25519PrivateKey,
    )
    from cryptography.hazmat.primitives.serialization import (  # noqa: PLC0415  as above
        load_pem_private_key,
    )

    data = _read(file)
    if file.stat().st_mode & 0o077:
        raise RegistryError(f"{file.name}: others may read this key; chmod 600 it")
    try:
        key = load_pem_private_key(data, None)
    except (ValueError, TypeError):
        raise RegistryError(
            f"{file.name}: no private key in PEM without a passphrase"
            " (openssl genpkey -algorithm ed25519 -out publish.key)"
        ) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise RegistryError(f"{file.name}: is no Ed25519 key")
    return key


def verify(directory: Path, keys: Keys, *, model: str, version: int) -> Manifest:
    """The manifest of a version, if one of the keys sealed it.

    The caller compares the digests of its own copy of the files with those of this manifest: only
    then are the files trusted as well.

    Raises
    ------
    UntrustedError : it has no manifest or no seal, or none of the keys made it.
    ManifestError : it is sealed, and speaks of another version.
    """
    try:
        folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise RegistryError(f"cannot be read: {error.strerror}") from None
    try:
        data = store.read_inside(folder, manifest.FILE, bytes_max=manifest.BYTES_MAX)
        seal = store.read_inside(folder, manifest.SEAL_FILE, bytes_max=_SEAL_BYTES)
    except FileNotFoundError as error:
        raise UntrustedError(f"it is not signed: it has no {error.filename}") from None
    except OSError as error:
        raise RegistryError(f"cannot be read: {error.strerror}") from None
    finally:
        os.close(folder)
    keys.check(data, seal)
    return manifest.read(data, model=model, version=version)


def _read(file: Path) -> bytes:
    try:
        with file.open("rb") as stream:
            return stream.read(_KEY_BYTES_MAX)
    except OSError as error:
        raise RegistryError(f"{file.name}: cannot be read: {error.strerror}") from None
