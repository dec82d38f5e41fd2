"""A local file that receives a blob."""

import os


class LocalFile:
    """The file at ``path``, which exists. The methods raise the OSErrors of the disk. Any thread may call."""

    def __init__(self, path: str) -> None:
        self.path = path

    def write_at(self, data: bytes, position: int) -> None:
        """Write ``data`` at ``position`` bytes from the start. Several threads may write to different positions."""
        with open(self.path, "r+b") as file:
            file.seek(position)
            file.write(data)

    def clear(self) -> None:
        """Truncate the file to zero bytes."""
        os.truncate(self.path, 0)
