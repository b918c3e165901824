"""Test that secrets reach the processes of a run, and no environment that the kernel shows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest

from mgrpo.engine.system import secrets

PASSWORD, TOKEN, HUB = secrets.NAMES
SECRET = "hunter2-e8b1"


def python(source: str, **environment: str) -> str:
    command = [sys.executable, "-c", textwrap.dedent(source)]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_secret_leaves_the_environment_as_the_kernel_shows_it(tmp_path):
    """Deleting a variable alone would leave it there. Neither this process nor a tool that it starts shows it."""
    found = python(
        """
        import os, subprocess, sys
        from pathlib import Path
        from mgrpo.engine.system import secrets
        assert secrets.get("MGRPO_STORE_PASSWORD") in Path("/proc/self/environ").read_text()
        secrets.take()
        print(secrets.get("MGRPO_STORE_PASSWORD"), "MGRPO_STORE_PASSWORD" in os.environ)
        print(repr(Path("/proc/self/environ").read_text()))
        print(subprocess.run("env; cat /proc/$PPID/environ", shell=True, capture_output=True).stdout)
        """,
        MGRPO_STORE_PASSWORD=SECRET,
        KEPT="something else",
    )
    first, *rest = found.splitlines()
    assert first == f"{SECRET} False"
    assert SECRET not in "".join(rest) and "".join(rest).count("something else") == 3


def test_a_process_gets_all_secrets_by_a_pipe(monkeypatch):
    monkeypatch.setenv(PASSWORD, SECRET)
    monkeypatch.setenv(HUB, "mine")
    assert secrets.keep(TOKEN, "drawn") == "drawn" == secrets.keep(TOKEN, "another")
    source = """
        import os, subprocess
        from pathlib import Path
        from mgrpo.engine.system import secrets
        secrets.take()
        print(Path("/proc/self/environ").read_text(), dict(os.environ), os.listdir("/proc/self/fd"))
        print([secrets.get(name) for name in secrets.NAMES])
    """
    inherited = {key: value for key, value in os.environ.items() if key not in secrets.NAMES}
    with secrets.passed() as (where, pipe):
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(source)],
            env=inherited | where,
            pass_fds=pipe,
            stdout=subprocess.PIPE,
            text=True,
        )
    told, _ = process.communicate()
    *shown, got = told.splitlines()
    assert got == repr([SECRET, "drawn", "mine"]) and SECRET not in "".join(shown)
    with pytest.raises(OSError):
        os.fstat(pipe[0])


def test_without_secrets_nothing_is_passed(monkeypatch):
    for name in secrets.NAMES:
        monkeypatch.delenv(name, raising=False)
    with secrets.passed() as given:
        assert given == ({}, ())
    assert secrets.get(PASSWORD) is None


def test_a_process_gets_only_the_secrets_that_it_needs(monkeypatch):
    for name in secrets.NAMES:
        monkeypatch.setenv(name, SECRET)
    with secrets.passed([PASSWORD]) as (where, _):
        assert json.loads(os.read(int(where[secrets.PIPE]), 1 << 16)) == {PASSWORD: SECRET}


def test_one_that_is_set_later_comes_first(monkeypatch):
    monkeypatch.setenv(PASSWORD, "old")
    secrets.take()
    assert secrets.get(PASSWORD) == "old" and PASSWORD not in os.environ
    monkeypatch.setenv(PASSWORD, "new")
    assert secrets.get(PASSWORD) == "new"
