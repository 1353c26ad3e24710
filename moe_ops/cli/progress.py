"""Lines of output above a progress line with the time left, where there is a terminal to show one."""

import sys


class Progress:
    """A bar on stderr through tqdm, if that is installed and stderr is a terminal; otherwise only the lines."""

    def __init__(self, total: int, unit: str = "cell") -> None:
        """Shows an empty bar of `total` units."""
        self._bar = None
        if sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self._bar = tqdm(total=total, unit=unit, leave=False)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.close()

    def say(self, text: str, file=None) -> None:
        """Prints a line (to stdout unless told otherwise) without tearing the bar."""
        if self._bar is not None:
            self._bar.write(text, file=file)
        else:
            print(text, file=file, flush=True)

    def begin(self, what: str) -> None:
        """Names the cell in progress."""
        if self._bar is not None:
            self._bar.set_postfix_str(what)

    def advance(self) -> None:
        """Counts a unit as done."""
        if self._bar is not None:
            self._bar.update()

    def extend(self, more: int) -> None:
        """Adds units to the total."""
        if self._bar is not None:
            self._bar.total += more
            self._bar.refresh()

    def clear(self) -> None:
        """Takes the bar away until it changes again, for output that is printed without it."""
        if self._bar is not None:
            self._bar.clear()
