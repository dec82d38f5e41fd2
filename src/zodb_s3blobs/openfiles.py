"""The errors of too many open files, for connections and cache files alike, and the advice for the operator."""

import errno

#: The errors for the limit of the process and for that of the whole system.
TOO_MANY_FILES = (errno.EMFILE, errno.ENFILE)

RAISE_THEIR_NUMBER = (
    "this process has too many open files: raise its limit (LimitNOFILE of a systemd unit, ulimit -n), or lower "
    "s3-concurrency"
)
