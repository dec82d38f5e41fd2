"""The server's own zeo.conf, as the commands read it."""

from pathlib import Path
from typing import Any

from ZEO.runzeo import ZEOOptions

from .config import S3BlobStorageFactory


class ConfigurationError(Exception):
    """The configuration cannot be used for this; the message says why and what to do."""


def find(path: Path, name: str | None = None) -> S3BlobStorageFactory:
    """The ``<s3blobstorage>`` of the storage ``name``, which may be left out where there is only one.

    A file that runzeo would refuse ends the process as it would end runzeo.
    """
    if not path.is_file():
        raise ConfigurationError(f"there is no file {path}: name the zeo.conf of the server with -C")
    options = ZEOOptions()
    options.realize(["-C", str(path)], doc="See runzeo --help.")
    found = {storage.name: _inside(storage) for storage in options.storages}
    ours = {name: section for name, section in found.items() if section is not None}
    if name is None and len(ours) == 1:
        return next(iter(ours.values()))
    if name in ours:
        return ours[name]
    names = ", ".join(ours) or "none"
    raise ConfigurationError(f"name one of the storages with s3blobstorage of {path} with --storage: {names}")


def _inside(opener: Any) -> S3BlobStorageFactory | None:
    while opener is not None and not isinstance(opener, S3BlobStorageFactory):
        opener = getattr(opener.config, "base", None)
    return opener


def open_base_read_only(section: S3BlobStorageFactory) -> Any:
    """The base of ``section``, opened beside a running server; ConfigurationError if it cannot be opened so."""
    base = section.config.base
    if not _set_read_only(base):
        raise ConfigurationError(
            "the storage inside s3blobstorage cannot be opened beside a running server: only a filestorage can, by "
            "itself or in a wrapper"
        )
    return base.open()


def _set_read_only(opener: Any) -> bool:
    config = opener.config
    if hasattr(config, "read_only"):
        config.read_only = True
        return True
    return getattr(config, "base", None) is not None and _set_read_only(config.base)
