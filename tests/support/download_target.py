"""A file that a blob is read into, as `zodb_s3blobs.s3.download.Target`."""


class Target:
    """A file to read a blob into; ``write`` is called first, for each piece."""

    def __init__(self, path, write=lambda: None):
        self.path = str(path)
        self._write = write
        self.clear()

    def write_at(self, data, position):
        self._write()
        with open(self.path, "r+b") as file:
            file.seek(position)
            file.write(data)

    def clear(self):
        open(self.path, "wb").close()
