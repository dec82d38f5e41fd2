"""How far long work is: a bar on a terminal, plain log lines elsewhere."""

import logging
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from tqdm import tqdm

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: How often, in seconds, to log a line.
LOG_EVERY = 30.0

# tqdm begins a postfix with a comma, and puts the unit next to the rate.
_LINE = "{desc}: {n_fmt} of {total_fmt}{unit}, {percentage:.0f}%{postfix}, {rate_fmt}, {remaining} left"
_LINE_WITHOUT_TOTAL = "{desc}: {n_fmt}{unit}{postfix}, {rate_fmt}, {elapsed} so far"


class Progress:
    """To be told of each step; `showing` makes one."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self._bytes = 0

    def step(self, size: int = 0) -> None:
        """One more is done, of ``size`` bytes."""
        if size:
            self._bytes += size
            self._bar.set_postfix_str(f"{tqdm.format_sizeof(self._bytes, 'B')}", refresh=False)
        self._bar.update()

    def over(self, items: Iterable[T]) -> Iterator[T]:
        """The same ``items``, a step each."""
        for item in items:
            yield item
            self.step()


@contextmanager
def showing(what: str, unit: str, total: int | None = None) -> Iterator[Progress]:
    """For the body, which does ``what`` with ``total`` of something whose plural is ``unit``."""
    if sys.stderr.isatty():
        options: dict[str, Any] = {"file": sys.stderr, "ncols": shutil.get_terminal_size().columns}
    else:
        options = {
            "file": _Log(),
            "mininterval": LOG_EVERY,
            "maxinterval": LOG_EVERY,
            "delay": LOG_EVERY,
            "bar_format": _LINE if total else _LINE_WITHOUT_TOTAL,
            "leave": False,
        }
    with tqdm(desc=what, total=total, unit=f" {unit}", **options) as bar:
        yield Progress(bar)


class _Log:
    """What tqdm takes for a file; what would overwrite a line there is a line of the log here."""

    def write(self, text: str) -> None:
        line = text.strip()
        if line:
            logger.info("%s", line)

    def flush(self) -> None:
        pass
