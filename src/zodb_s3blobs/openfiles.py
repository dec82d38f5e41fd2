"""What to do where no more files can be opened, whatever they are wanted for: connections, or files of the cache."""

import errno

#: The errors of the process and of the whole system.
TOO_MANY_FILES = (errno.EMFILE, errno.ENFILE)

RAISE_THEIR_NUMBER = (
    "this process has too many open files: raise its limit (LimitNOFILE of a systemd unit, ulimit -n), or lower "
    "s3-concurrency"
)
