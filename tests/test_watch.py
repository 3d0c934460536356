"""The files that a reloader's child looks at, in this process."""

import threading
from pathlib import Path

import pytest

from serving.logs import LoggingSettings, configure_logging
from serving.watch import look_at, touch_after_change
from tests.lib.servers import wait_until


def test_source_that_cannot_be_touched_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A change that cannot be passed on is one line, which says what to do."""
    configure_logging(LoggingSettings(format="json"))
    file, source = tmp_path / "settings.toml", tmp_path / "none/app.py"
    touch_after_change(look_at([file]), source)
    file.touch()
    seen: list[str] = []
    wait_until(lambda: seen.append(capsys.readouterr().err) or "\n" in "".join(seen), "the line")
    reason = f'"reason":"{source} cannot be touched: No such file or directory","hint":"start it anew"'
    assert reason in "".join(seen)
    assert "".join(seen).count("\n") == 1


def test_file_may_go_while_it_is_looked_at(tmp_path: Path) -> None:
    """An editor that renames a file, and puts another in its place, ends no look."""
    file, is_over = tmp_path / "settings.toml", threading.Event()
    file.touch()

    def rename() -> None:
        while not is_over.is_set():
            file.rename(tmp_path / "settings.toml~")
            (tmp_path / "settings.toml~").rename(file)

    editor = threading.Thread(target=rename)
    editor.start()
    try:
        times = {look_at([file])[file] for _ in range(20_000)}
    finally:
        is_over.set()
        editor.join()
    assert times == {None, file.stat().st_mtime_ns}
