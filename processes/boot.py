"""The start: settings are read, the model is loaded, and a child proves it, before the service listens."""

from __future__ import annotations

import functools
import gc
import os
import time

import app
from processes.loading import Deadline, Loading, end_when_late, prepare_settings, prove_in_child, refuse_start
from processes.trial import Trial, finish, wait_for
from serving.errors import StartupError, reason_of
from serving.output import protect_output
from serving.predictor.artifact import ModelSettings
from serving.web.service import Service

proof_s = 0.0  # that the proof of the first service took


def settings_in_force() -> app.Settings:
    """Return the settings of this process's service.

    At the start that service is made, and a mistake ends the process with one line. At a reload it is there: what has
    been proven.
    """
    global proof_s
    service = app.current_service()
    if service is None:
        protect_output()
        freeze()  # the libraries, but no service, for a reload drops it
        try:
            service, proof_s = _start()
        except StartupError as error:
            refuse_start(error)
        except Exception as error:  # of what nobody has thought of
            refuse_start(StartupError(reason_of(error)))
    return service.settings


def _start() -> tuple[Service[app.Settings], float]:
    """Load and prove what is served, and return it with the seconds that the proof took. Raises `StartupError`."""
    deadline = Deadline(ModelSettings().load_timeout_s)
    watch = Trial(functools.partial(end_when_late, os.getpid(), deadline), "")
    loaded = finish(wait_for(Loading(prepare_settings(deadline), deadline), deadline.check))
    started = time.monotonic()
    service: Service[app.Settings] = finish(prove_in_child(loaded, deadline, deadline.check))
    took_s = time.monotonic() - started
    watch.stop()
    app.set_current_service(service)
    return service, took_s


def freeze() -> None:
    """Keep the garbage collector from what is there for good, which it would go through again and again, in vain."""
    gc.collect()
    gc.freeze()
