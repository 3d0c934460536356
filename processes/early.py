"""Signals that come while the process starts. Imported before everything that takes time."""

import signal

hups: list[int] = []  # signals that came before the arbiter had its own handler


def handle_signals() -> None:
    """Keep a HUP for later, which would end the process while it starts; let Ctrl-C end it without a traceback."""
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
        signal.signal(signal.SIGHUP, lambda number, _: hups.append(number))
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
