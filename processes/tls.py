"""Certificate and key: where they are, and whether they can be served with."""

from __future__ import annotations

import os
import ssl

import app
from serving.errors import SettingsError
from serving.settings import explain_relative


def tls_files(settings: app.Settings) -> list[str | None]:
    """Return the paths of certificate and key, or None for each that is not set."""
    names = (settings.server.certfile, settings.server.keyfile)
    return [str(settings.folder / name) if name else None for name in names]


def check_tls(settings: app.Settings) -> None:
    """Raise `SettingsError` unless certificate and key, if there are any, can be read and belong together."""
    files = dict(zip(("certfile", "keyfile"), tls_files(settings), strict=True))
    for name, file in files.items():
        if file and not os.access(file, os.R_OK):
            cure = explain_relative(getattr(settings.server, name))
            raise SettingsError(f"{settings.place('server', name)} is {file!r}, which cannot be read{cure}")
    certificate, key = files.values()
    if key and not certificate:
        raise SettingsError(f"{settings.place('server', 'keyfile')} needs server.certfile beside it")
    try:
        if certificate:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(certificate, key, password="")
    except (OSError, ValueError):  # of which ssl.SSLError is one; it does not say more
        rule = "should be a certificate in PEM, with its key, which is not encrypted, in server.keyfile or behind it"
        raise SettingsError(f"{settings.place('server', 'certfile')} is {certificate!r}; it {rule}") from None
