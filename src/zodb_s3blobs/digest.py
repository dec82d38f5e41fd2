"""The checksums of files."""

import hashlib

#: The name of the algorithm of every blob's checksum, and of the metadata entry of the object that has it.
SHA256 = "sha256"

_READ = 1 << 18


def digest_of(algorithm: str, filename: str) -> str:
    """Return the checksum of the file in hex. Reads the file."""
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with open(filename, "rb", buffering=0) as file:
        while chunk := file.read(_READ):
            digest.update(chunk)
    return digest.hexdigest()
