"""Shows the progress while a first import compiles: a bar on a terminal, else one line in the log."""

from __future__ import annotations

import contextlib
import logging
import sys
from typing import TYPE_CHECKING

from . import build

if TYPE_CHECKING:
    import rich.progress

_log = logging.getLogger("se_fused")


class Progress(build.Watcher, contextlib.ExitStack):
    """Open it while a group is built. It shows nothing if there is a build already."""

    def __init__(self, group: str) -> None:
        super().__init__()
        self._group = group
        self._bar: rich.progress.Progress | None = None

    def waits(self) -> None:
        _log.warning(build.WAITING)

    def begins(self) -> None:
        what = f"se_fused: compiling the {self._group.upper()} kernels, once; "
        what += f"this usually takes {build.usual_seconds(self._group)} s"
        if not self._opens_bar(what):
            _log.warning(what)

    def _opens_bar(self, what: str) -> bool:
        """Open a bar if stderr is a terminal. Returns whether it did."""
        try:
            if not sys.stderr.isatty():
                return False
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        except (AttributeError, ValueError, ImportError):  # stderr is closed or replaced, or there is no rich
            return False
        console = Console(stderr=True)
        if console.is_interactive:
            columns = TextColumn(what), BarColumn(), MofNCompleteColumn(separator=" of "), TimeElapsedColumn()
            self._bar = self.enter_context(Progress(*columns, console=console, transient=True))
            self._bar.add_task("", total=None)
        return self._bar is not None

    def step(self, done: int, steps: int) -> None:
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, total=steps)
