"""Progress in a notebook: a bar in the output of the cell that is running."""

import html
import sys
from typing import Any


def is_notebook() -> bool:
    """Return whether this process runs the cells of a notebook."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return shell is not None and hasattr(shell, "kernel")


class Bar:
    """A progress bar. It appears when it is first shown, and stays with its last text."""

    def __init__(self) -> None:
        self._shown: Any = None

    @property
    def is_shown(self) -> bool:
        return self._shown is not None

    def show(self, done: float, text: str) -> None:
        """Show the bar with a part done, from 0 to 1, and a text beside it."""
        from IPython.display import display

        bar = f'<progress value="{done:.4f}" max="1" style="width: 40%"></progress> '
        content = {"text/html": f"{bar}<code>{html.escape(text)}</code>", "text/plain": f"{done:4.0%}  {text}"}
        if self._shown is None:
            show: Any = display
            self._shown = show(content, raw=True, display_id=True)
        else:
            self._shown.update(content, raw=True)
