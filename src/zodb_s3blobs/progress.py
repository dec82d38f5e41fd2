"""The progress of long work: a bar on a terminal, log lines elsewhere."""

import logging
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from tqdm import tqdm

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Seconds between two log lines.
LOG_EVERY = 30.0

# tqdm begins a postfix with a comma, and puts the unit next to the rate.
_LINE = "{desc}: {n_fmt} of {total_fmt}{unit}, {percentage:.0f}%{postfix}, {rate_fmt}, {remaining} left"
_LINE_WITHOUT_TOTAL = "{desc}: {n_fmt}{unit}{postfix}, {rate_fmt}, {elapsed} so far"


class Progress:
    """A counter of the steps of some work; `showing` makes one."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self._bytes = 0

    def step(self, size: int = 0) -> None:
        """Count one more item, of ``size`` bytes."""
        if size:
            self._bytes += size
            self._bar.set_postfix_str(f"{tqdm.format_sizeof(self._bytes, 'B')}", refresh=False)
        self._bar.update()

    def over(self, items: Iterable[T]) -> Iterator[T]:
        """Yield ``items``, and count a step for each."""
        for item in items:
            yield item
            self.step()


@contextmanager
def showing(what: str, unit: str, total: int | None = None) -> Iterator[Progress]:
    """Show the progress of ``what`` during the body. ``unit``: plural noun of the items; ``total``: their number."""
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
    """A file for tqdm that turns each update of the bar into a log line."""

    def write(self, text: str) -> None:
        line = text.strip()
        if line:
            logger.info("%s", line)

    def flush(self) -> None:
        pass
