"""Gunicorn's settings, from settings.toml: `gunicorn -c gunicorn.conf.py`.

Gunicorn executes this file at the start and again at each HUP, so it holds assignments only. Every name here that
equals one of gunicorn's settings is that setting; all other names are ignored. How workers are started, reloaded and
drained stands in `processes/`, which is imported once: a change there takes a restart.
"""

import sys
from pathlib import Path

sys.path[:] = dict.fromkeys([str(Path(__file__).resolve().parent), *sys.path])  # for `gunicorn -c` from another folder

from processes import early

early.handle_signals()  # before the rest is imported

from processes import boot, hooks
from processes.options import WORKERS
from processes.tls import tls_files

# At the start: read the settings, load the model, and prove it in a child process; a mistake ends gunicorn here, with
# one line. At HUP: the settings that the reload has already proven.
settings = boot.settings_in_force()

wsgi_app, worker_class = WORKERS[settings.worker_class]
workers = settings.workers
bind = settings.server.bind
backlog = settings.server.backlog  # connections
timeout = settings.server.timeout  # seconds
graceful_timeout = settings.server.graceful_timeout  # seconds
keepalive = settings.server.keepalive  # seconds
max_requests = settings.server.max_requests
max_requests_jitter = settings.server.max_requests_jitter
certfile, keyfile = tls_files(settings)

worker_connections = 10_000  # under gevent, or the idle ones would keep others out
sendfile = False  # or gevent would send a file without our time-out
limit_request_line = 8190  # bytes: the most that gunicorn allows, for rows given as a query
limit_request_fields = 100
limit_request_field_size = 8190  # bytes
forwarder_headers = ""  # or a local client's header SCRIPT_NAME would change the path
control_socket_disable = True  # or gunicorn opens one in the home folder
logger_class = hooks.GunicornLogger

on_starting = hooks.on_starting  # the arbiter becomes a `Master`, whose reload is a transaction
when_ready = hooks.when_ready
pre_fork = hooks.pre_fork
post_fork = hooks.post_fork
post_worker_init = hooks.post_worker_init
child_exit = hooks.child_exit
worker_exit = hooks.worker_exit
