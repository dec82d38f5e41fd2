"""The last safety net of a ZEO server: for any error, the client gets an answer that it can decode.

ZEO sends an exception as the name of its class, and its attributes or else its arguments. A client that cannot decode
these, because they are objects of a library that it does not have, never answers its caller. The storage turns the
errors of its parts into a plain StorageError long before they get here; this module handles unforeseen ones.
"""

import logging
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from ZEO.asyncio.server import Delay
from ZODB import POSException
from ZODB.POSException import (
    BTreesConflictError,
    ConflictError,
    MultipleUndoErrors,
    POSError,
    POSKeyError,
    ReadConflictError,
    ReadOnlyError,
    StorageError,
    StorageTransactionError,
)

from ..errors import S3BlobsError

logger = logging.getLogger(__name__)

_CONFLICT = ("message", "oid", "serials", "class_name")

#: Class that stock clients recreate -> the attributes that they use; without attributes, they use the arguments.
#: For any other class, clients raise a ZEO.Exceptions.ServerException, which is a StorageError.
REMADE: dict[type[BaseException], tuple[str, ...]] = {
    KeyError: (),
    TypeError: (),
    POSKeyError: (),
    ReadOnlyError: (),
    StorageTransactionError: (),
    ConflictError: _CONFLICT,
    ReadConflictError: _CONFLICT,
    BTreesConflictError: ("p1", "p2", "p3", "reason"),
    MultipleUndoErrors: ("_errs",),
}

#: The deepest nesting of lists; ZODB's lists have two levels, and msgpack has a limit.
_DEEPEST = 10

#: ZEO's flag of a reply that is an exception.
_EXCEPTION = 2


class Answer(Delay):
    """An answer that is sent later. A StorageError is a sentence for the operator, and takes one line of the log.

    ``what`` begins that line. ZEO would log the way of the error through the code, for each client that meets it.
    """

    what = "A request fails"
    unlogged_exception_types = (*Delay.unlogged_exception_types, StorageError)

    def error(self, exc_info: Any) -> None:
        """Answer with the error of ``exc_info``, the result of `sys.exc_info`."""
        if exc_info[0] is StorageError:
            client = self.protocol.get_peername() if self.protocol is not None else None
            logger.error("%s (client %s): %s", self.what, client, exc_info[1])
        super().error(exc_info)


def guard(connection: Any) -> None:
    """Make ``connection``, a ZEO ServerProtocol, send only plain errors, and an answer to every request."""

    def send_error(message_id: Any, error: BaseException, send_error: bool = False) -> None:
        send_reply(message_id, plain(error), flag=_EXCEPTION)

    def send_reply(message_id: Any, result: Any, send_error: bool = False, flag: int = 0) -> None:
        # Replaces ZEO's method, which after "Couldn't pickle response" still writes the result that it cannot encode.
        # That fails, or with a full connection stays in its queue and breaks all messages that follow.
        if isinstance(result, Delay):
            result.set_sender(message_id, connection)
            return
        try:
            message = connection.encode(message_id, flag, ".reply", result)
        except Exception:
            logger.exception("A reply of the type %s cannot be sent to a client", type(result))
            if flag == _EXCEPTION:
                connection.close()
            else:
                connection.send_error(message_id, StorageError(f"The server cannot send its reply; {_SEE_LOG}"))
        else:
            connection.write_message(message)

    connection.send_error = send_error
    connection.send_reply = send_reply


def plain(error: BaseException) -> tuple[str, Any]:
    """Return the form of ``error`` for a client: the name of a class, and its attributes or arguments.

    These consist of plain values only. An error that is not plain becomes a StorageError, and is logged.
    """
    try:
        sent = _as_it_is(error)
    except Exception:  # the error lacks attributes of its class
        sent = None
    if sent is not None and is_plain(sent[1]):
        return sent
    text = _text(error)
    logger.error("A client is sent a StorageError in place of this: %s", text, exc_info=error)
    return _name(StorageError), (text,)


def _as_it_is(error: BaseException) -> tuple[str, Any] | None:
    """Return the form of an ``error`` that is ZODB's own, or derived from a class that clients recreate; else None."""
    kind = type(error)
    if kind.__module__ == POSException.__name__ and kind not in REMADE:
        return _name(kind), error.__dict__ or error.args
    known = next((base for base in kind.__mro__ if base in REMADE), None)
    if known is None or (known is not kind and not issubclass(known, POSError)):
        return None
    attributes = {name: getattr(error, name) for name in REMADE[known]}
    if isinstance(error, MultipleUndoErrors):
        # FileStorage's reasons are exceptions; clients only show a reason, so its text is enough.
        attributes["_errs"] = [(oid, str(why) if isinstance(why, POSError) else why) for oid, why in error._errs]
        if not error._errs:
            return None  # clients use the first reason
    return _name(known), attributes or error.args


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__name__}"


def is_plain(value: Any, depth: int = _DEEPEST) -> bool:
    """Return whether every client can decode ``value``, as a pickle and by msgpack."""
    kind = type(value)
    if kind in (type(None), bool, float, bytes):
        return True
    if kind is int:
        return -(1 << 63) <= value < 1 << 64
    if kind is str:
        return value.isascii() or not any("\ud800" <= character <= "\udfff" for character in value)
    if kind in (tuple, list):
        return depth > 0 and all(is_plain(item, depth - 1) for item in value)
    if kind is dict:
        return all(type(key) is str for key in value) and is_plain([*value, *value.values()], depth)
    return False


_SEE_LOG = "the server's log has more"


def _text(error: BaseException) -> str:
    """Return the text of ``error`` for a client; only its class if the text was not written for users."""
    kind = type(error)
    if isinstance(error, S3BlobsError):
        presentable = True
    elif isinstance(error, OSError):
        presentable = kind.__module__ == "builtins" and error.errno is not None and is_plain(error.args)
    else:
        presentable = isinstance(error, POSError) and is_plain(error.args)
    if presentable:
        try:
            text = f"{kind.__name__}: {error}"
            if is_plain(text):
                return text
        except Exception:
            pass  # the error lacks attributes that its text needs
    return f"{kind.__module__}.{kind.__qualname__} in the server; {_SEE_LOG}"


# ZEO answers a request only after an Exception, but other errors exist: asyncio.CancelledError, or the panic of a
# library written in Rust.


@contextmanager
def exceptions_only() -> Iterator[None]:
    """Turn an error of the body that is not an Exception into a StorageError; for threads, which get no signals."""
    try:
        yield
    except Exception:
        raise
    except BaseException as error:
        raise StorageError(_text(error)) from error


def check(future: Future) -> None:
    """Raise a StorageError if ``future``, which is done, has failed with an error that is not an Exception."""
    error = None if future.cancelled() else future.exception()
    if error is not None and not isinstance(error, Exception):
        raise StorageError(_text(error)) from error
