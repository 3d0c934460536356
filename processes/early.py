"""HUPs that come while the process starts. Imported before everything that takes time."""

import signal

hups: list[int] = []  # signals that came before the arbiter had its own handler


def keep_hups() -> None:
    """Keep a HUP for later. Without a handler it would end the process while it starts."""
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
        signal.signal(signal.SIGHUP, lambda number, _: hups.append(number))
