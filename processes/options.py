"""Gunicorn's options, which win over the settings: those that are honoured, and those that are refused by name."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from typing import Any

from gunicorn.config import Config

import app
from processes.worker import SupervisedWorker
from serving.errors import StartupError, listed

WORKERS = {  # the settings' word: what gunicorn serves, and by which class
    "uvicorn": ("app:asgi", "processes.uvicorn_worker.UvicornWorker"),
    "gevent": ("app:wsgi", "processes.gevent_worker.GeventWorker"),
}
APPS = {name: served for name, (served, _) in WORKERS.items()}
KNOWN_WORKERS = {  # worker classes by name, with what each serves
    **{worker: served for served, worker in WORKERS.values()},
    "uvicorn_worker.UvicornWorker": APPS["uvicorn"],
    "gevent": APPS["gevent"],
}
CHOICES = {"protocol": ("http",), "http_parser": ("auto", "python")}  # other values would answer nobody
# Options that act alike under both workers.
HONOURED = """
    args config wsgi_app chdir pythonpath raw_env check_config print_config spew
    bind backlog reuse_port workers worker_class worker_tmp_dir timeout graceful_timeout max_requests
    max_requests_jitter keepalive limit_request_line limit_request_fields limit_request_field_size protocol http_parser
    forwarded_allow_ips sendfile certfile keyfile ssl_version cert_reqs ca_certs ciphers
    daemon pidfile user group umask initgroups proc_name enable_stdio_inheritance control_socket_disable loglevel
"""
# Options that uvicorn's worker does not know, which parses and accepts by itself.
GEVENTS = """
    worker_connections proxy_protocol proxy_allow_ips header_map forwarder_headers strip_header_spaces
    casefold_http_method permit_obsolete_folding permit_unconventional_http_method permit_unconventional_http_version
"""
LOGS = "accesslog capture_output errorlog access_log_format logger_class logconfig logconfig_dict logconfig_json syslog"
NOT_USED = "is not used: every line of the log goes to standard error; leave it out, and see [logging]"
REFUSED = {  # what is wrong with an option, and what to do instead
    "preload_app": "would have the master predict; leave it out: the workers share the model anyway",
    "reload": "would not see a change, since workers share the master's code; leave it out, and restart",
    **dict.fromkeys(LOGS.split(), NOT_USED),
    "statsd_host": NOT_USED,
    "threads": "is not used: each worker has a share of the cores, as the log says; leave it out",
}
SHIPPED = {"errorlog", "access_log_format", "logger_class", "threads"}  # options of these that have a value by default


def read_options() -> dict[str, Any]:
    """Return gunicorn's options of the command line and of GUNICORN_CMD_ARGS, which win over gunicorn.conf.py.

    Gunicorn parses them anew once it has read that file; a check of the configuration has no later hook.
    """
    return app.read_gunicorn_options(with_command_line=True)


def load_worker(config: Config) -> type:
    """Return the worker's class, imported by its name. Raises what importing it raises."""
    kind: type = config.worker_class
    return kind


def final_options(config: Config) -> dict[str, Any]:
    """Return gunicorn's options as they are in force."""
    return {name: setting.get() for name, setting in config.settings.items()}


def check_options(options: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raise `StartupError` if the service cannot work with gunicorn's options, or not with one that was given."""
    in_force = {name for name in REFUSED.keys() - SHIPPED if options.get(name)}
    for name in sorted(in_force | given.keys() - {*HONOURED.split(), *GEVENTS.split()}):
        raise StartupError(f"{name} {REFUSED.get(name, 'is not used by this service; leave it out')}")
    for variable in given.get("raw_env", ()):
        if variable.upper().startswith("SERVING_"):
            name = variable.partition("=")[0]
            raise StartupError(f"raw_env sets {name}, which is read before; set it in the environment")
    kind = options.get("worker_class")
    is_ours = isinstance(kind, type) and issubclass(kind, SupervisedWorker)
    if not (kind is None or is_ours or kind in KNOWN_WORKERS):
        rule = "leave it out, and set server.worker_class to 'uvicorn' or 'gevent'"
        raise StartupError(f"gunicorn's worker_class is {getattr(kind, '__name__', kind)!r}; {rule}")
    for name, allowed in CHOICES.items():
        if (value := options.get(name, allowed[0])) not in allowed:
            raise StartupError(f"gunicorn's {name} is {value!r}; leave it out, or use one of {listed(allowed)}")
    for name in ("workers", "worker_connections", "keepalive"):
        if (number := options.get(name, 1)) < 1:
            raise StartupError(f"gunicorn's {name} is {number}; use 1 or more, or nobody is answered")
    folder = options.get("worker_tmp_dir")
    _check_folder(f"worker_tmp_dir is {folder!r}, where no file" if folder else "no temporary file", folder)
    if pidfile := options.get("pidfile"):
        _check_folder(f"pidfile is {pidfile!r}, where no file", os.path.dirname(pidfile) or ".")


def _check_folder(problem: str, folder: str | None) -> None:
    """Raise `StartupError` if no file can be made in a folder, or without one where temporary files go."""
    try:
        file, name = tempfile.mkstemp(prefix="gunicorn-", dir=folder)
        os.close(file)
        os.unlink(name)
    except OSError as error:
        rule = "gunicorn needs one; see --worker-tmp-dir, --pid and TMPDIR"
        raise StartupError(f"{problem} can be made: {error.strerror or error}; {rule}") from None


def interface_of(options: Mapping[str, Any], settings: app.Settings) -> str:
    """Return the one of `APPS` that the worker serves which gunicorn's options name, or else the settings."""
    return KNOWN_WORKERS.get(options.get("worker_class", ""), APPS[settings.worker_class])


def is_gevents(settings: app.Settings) -> bool:
    """Return whether the worker that will serve is gevent's, or gunicorn's own of that name."""
    return interface_of(read_options(), settings) == APPS["gevent"]


def check_app(uri: str, options: Mapping[str, Any], given: Mapping[str, Any], settings: app.Settings) -> None:
    """Raise `StartupError` if the worker cannot work with the app, which may be of the other interface, or options."""
    called = interface_of(options, settings)
    in_force = {**given, "proxy_protocol": options.get("proxy_protocol")}
    in_vain = next((name for name in GEVENTS.split() if in_force.get(name) not in (None, False, "off")), None)
    if called == APPS["uvicorn"] and in_vain:
        raise StartupError(f"{in_vain} is not known to uvicorn's worker; leave it out, or use gevent's")
    native = {"fastapi": "app:asgi", "flask": "app:wsgi"}[settings.framework]
    asked = native if uri in ("app:app", "app:create_app()") else uri
    if asked in APPS.values() and asked != called:
        worker = next(name for name, needed in APPS.items() if needed == called)
        raise StartupError(f"the app is {uri!r}, which {worker}'s worker cannot run; use {called!r}")
