"""The reload: a new service and its workers take the place of the old ones, or everything stays as it was.

What happens at HUP, in order:

1. `Master.handle_hup` notes it, and the master's next turn (`Master.manage_workers`) begins it: `Reload.go_on`.
2. `_rehearse`: a child does what a start does: it reads the settings, loads the model in a thread
   (`loading.Loading`), has a child of its own prove it as the worker is patched, and configures gunicorn
   (`trial.try_out`).
3. `_load`: the master reads and loads the same, and a child of it proves it. If settings or model were changed since 2,
   the reload is refused.
4. `_replace`: gunicorn.conf.py is read again, new addresses are opened, and the new workers are forked (`_start`).
5. When all of them are ready, the old ones are told to end (`_retire`), and `reloaded` is logged. Each stops accepting,
   answers what is under way, and ends (`DrainingServer.shutdown` or `GeventWorker.drain`); one that takes longer than
   `graceful_timeout` is killed (`Master.manage_workers`).

Whatever fails before 5 is logged as `reload_refused`. 2 changes nothing in the master, and is where nearly all fails
that can. What 3 imports stays, and so does gevent's patch of `ssl`, which comes before a model's code where gevent is
to serve it; `_restore` takes back what 4 did.
"""

from __future__ import annotations

import functools
import gc
import json
import time
from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import structlog

import app
from processes import options
from processes.handshake import BOOTING, Handshake
from processes.listeners import close, has_file, listen_at_all
from processes.loading import Deadline, Loaded, Loading, load_and_prove, prepare_settings, prove_in_child
from processes.trial import finish, try_out, wait_for
from serving.errors import SettingsError, StartupError
from serving.web.service import Service

if TYPE_CHECKING:
    from processes.master import Master

log = structlog.get_logger()

START_TIMEOUT_S = 10.0  # seconds of a worker's start, before `server.timeout` counts
START_TIMEOUT_PROOFS = 10.0  # as many times the seconds of its model's proof come on top
MAX_WAIT_S = 30.0


def start_timeout_s(proof_s: float) -> float:
    """Return how long a worker may take to start, whose model was proven in so many seconds."""
    return START_TIMEOUT_S + START_TIMEOUT_PROOFS * proof_s


@dataclass
class Previous:
    """What goes on if a reload is refused."""

    service: Service[app.Settings]
    application: dict[str, Any]  # the attributes of gunicorn's application object, its configuration among them
    listeners: list[Any]
    workers: list[int]
    num_workers: int
    handshake: Handshake


class Reload:
    """The reload of a master, which goes on a step with each turn of its loop, and waits where it yields."""

    def __init__(self, master: Master) -> None:
        self.master = master
        self.is_asked = False
        self.is_loading = False  # a thread loads; no worker is forked until it has ended or is given up
        self.previous: Previous | None = None  # while workers are replaced
        self._steps: Generator[None, None, None] | None = None
        self._loading: Loading | None = None  # the last one

    def go_on(self) -> None:
        """Take the next step. If another HUP came, give up the reload that is under way, and begin anew."""
        if self.is_asked and not self.is_loading:
            if self._steps is not None:
                self._steps.close()
                log.info("reload_given_up", reason="another HUP came")
            self.is_asked, self._steps = False, self._run()
        if self._steps is None:
            return
        try:
            next(self._steps)
            return
        except StopIteration:
            log.info("reloaded", **self.master.service.identity)
        except Exception as error:  # whatever is wrong, what there was goes on
            is_ours = isinstance(error, StartupError)
            reason = str(error) if type(error) is StartupError else f"{type(error).__name__}: {error}"
            log.error("reload_refused", reason=reason, serving=self.master.service.identity, exc_info=not is_ours)
        self._steps = None
        gc.collect()  # the types of the old contract's rows refer to each other
        if self.is_asked:
            self.master.wakeup()

    def stop(self) -> None:
        """Give up, and put back what was replaced."""
        if self._steps is not None:
            self._steps.close()
            self._steps = None

    def _run(self) -> Generator[None, None, None]:
        """Take new settings and a new model, or raise and leave all as it was."""
        log.info("reload_started")
        if self._loading is not None and not self._loading.has_ended():  # its thread cannot be stopped
            raise StartupError("the model of an earlier reload is still being loaded; send HUP later, or restart")
        deadline = Deadline(self.master.service.settings.model.load_timeout_s)
        started = time.monotonic()
        identity = yield from try_out(functools.partial(self._rehearse, deadline), "the new model", deadline.check)
        took_s = time.monotonic() - started
        service = yield from self._load()
        if json.dumps(service.identity) != identity:
            raise StartupError("settings or model were changed while they were loaded; send HUP again")
        self.master.start_timeout_s = start_timeout_s(took_s)
        yield from self._replace(service)

    def _rehearse(self, deadline: Deadline) -> str:
        """Do in a child what the master and a worker will do; the child's changes end with it."""
        service: Service[app.Settings] = finish(load_and_prove(deadline))
        self.master.use(service)
        self._configure()
        options.load_worker(self.master.app.cfg)  # so that a missing package is found here
        if not self.master.app.app_uri.startswith("app:"):
            self.master.app.load()  # a user's module
        return json.dumps(service.identity)

    def _load(self) -> Generator[None, None, Service[app.Settings]]:
        """Load in a thread while the master's loop goes on; then a child proves that forked workers can predict.

        A start does the same, so no reload takes what the next start would refuse.
        """
        deadline = Deadline(self.master.service.settings.model.load_timeout_s)
        self.is_loading, self._loading = True, Loading(prepare_settings(deadline), deadline, self.master.wakeup)
        try:
            loaded: Loaded = yield from wait_for(self._loading, deadline.check)
        finally:
            self.is_loading = False
        return (yield from prove_in_child(loaded, deadline, deadline.check))

    def _replace(self, service: Service[app.Settings]) -> Generator[None, None, None]:
        """Fork workers of the new service, and retire the old ones once all the new ones are ready.

        Only `self.previous` refers to the old service while they are forked: a local variable would be copied by the
        fork, and keep the old model in each new worker's memory.
        """
        master = self.master
        self.previous = Previous(
            master.service,
            dict(master.app.__dict__),
            master.LISTENERS,
            [*master.WORKERS],
            master.num_workers,
            master.handshake,
        )
        master.handshake = Handshake()
        master.use(service)
        new: list[int] = []
        try:
            self._configure()
            master.LISTENERS = yield from self._listen()
            master.setup(master.app)
            yield from self._start(new)
        except (Exception, GeneratorExit):
            self._restore(self.previous, new)
            raise
        else:
            self._retire(self.previous)
        finally:
            self.previous = None

    def _configure(self) -> None:
        """Read gunicorn's configuration again, gunicorn.conf.py among it."""
        application = self.master.app
        try:
            application.reload()
        except SystemExit:
            problem = "gunicorn.conf.py or gunicorn's options are refused; the lines before this one say why"
            raise StartupError(problem) from None
        final, given = options.final_options(application.cfg), options.read_options()
        options.check_options(final, given)
        options.check_app(application.app_uri, final, given, self.master.service.settings)

    def _listen(self) -> Generator[None, None, list[Any]]:
        """Return a listener for each address of the configuration: those that there are, and new ones.

        An address may be in use for as long as workers drain that served it before an earlier reload.
        """
        master, cfg = self.master, self.master.app.cfg
        are_same = cfg.address == master.cfg.address and all(has_file(old.cfg_addr) for old in master.LISTENERS)
        if are_same or master.systemd or cfg.reuse_port:
            return master.LISTENERS
        while True:
            try:
                return listen_at_all(cfg, master.log, master.service.settings.place("server", "bind"), master.LISTENERS)
            except SettingsError:
                if not master.retired:
                    raise
            yield

    def _start(self, new: list[int]) -> Generator[None, None, None]:
        """Fork the new workers, and wait until each has been ready."""
        master = self.master
        for _ in range(master.num_workers):
            new.append(master.spawn_worker())
        ready: set[int] = set()
        latest_s = master.start_timeout_s + (master.timeout or MAX_WAIT_S) + START_TIMEOUT_S
        end = time.monotonic() + latest_s
        while not ready.issuperset(new):
            if time.monotonic() > end:
                raise StartupError(f"a new worker was not ready after {latest_s:.0f} s")
            yield
            ready |= {pid for pid in new if master.stage_of(pid) != BOOTING}
            if not ready.union(master.WORKERS).issuperset(new):
                raise StartupError("a new worker ended before it was ready; the log says why")

    def _restore(self, previous: Previous, new: list[int]) -> None:
        """Go back to what was before."""
        master = self.master
        opened = [listener for listener in master.LISTENERS if listener not in previous.listeners]
        master.handshake.drop(listener in opened for listener in master.LISTENERS)
        master.app.__dict__.update(previous.application)
        master.LISTENERS, master.handshake = previous.listeners, previous.handshake
        master.use(previous.service)
        master.setup(master.app)
        master.num_workers = previous.num_workers
        for pid in new:
            master.retire(pid)
        close(opened)

    def _retire(self, previous: Previous) -> None:
        """Tell the workers that were before to end, and close the addresses that are no more."""
        master = self.master
        previous.handshake.drop(listener not in master.LISTENERS for listener in previous.listeners)
        for pid in previous.workers:
            master.retire(pid)
        close(self._dropped(previous), master.LISTENERS)
        master.cfg.on_reload(master)
        master.announce()

    def _dropped(self, previous: Previous) -> list[Any]:
        return [listener for listener in previous.listeners if listener not in self.master.LISTENERS]

    def drop_previous(self) -> None:
        """Close, in a worker that was just forked, what only the workers before it serve."""
        if self.previous is not None:
            for listener in self._dropped(self.previous):
                listener.close()
            self.previous = None
