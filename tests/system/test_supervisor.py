"""Test processes that fail, hang, are killed or are asked to stop: the others go on, and none is left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from mgrpo.engine.system import supervisor
from mgrpo.engine.system.process import AGAIN, FINAL, START_AGAIN, Interrupted
from mgrpo.engine.system.supervisor import ProcessSpec, Supervisor

MARK = "MGRPO_TEST_MARK"
SECONDS = 60.0  # how long a test waits at most


@pytest.fixture(autouse=True)
def mark(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Set a mark in the environment of all that a test starts; a process that lives on fails the test."""
    name = uuid.uuid4().hex
    monkeypatch.setenv(MARK, name)
    yield name
    left = survivors(name)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


@pytest.fixture(autouse=True)
def restarts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "LONGEST_DELAY", 0.0)


def survivors(name: str) -> list[int]:
    """Return the processes with the mark that still live after a moment, which the kernel needs to end them."""
    until = time.monotonic() + 5
    while (found := marked_processes(name)) and time.monotonic() < until:
        time.sleep(0.05)
    return found


def marked_processes(name: str) -> list[int]:
    """Find processes by the environment that they were started with; zombies do not count."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            marked = f"{MARK}={name}".encode() in (folder / "environ").read_bytes().split(b"\0")
            alive = re.search(r"^State:\s+(\w)", (folder / "status").read_text(), re.MULTILINE)[1] not in "ZX"
        except (FileNotFoundError, PermissionError, ProcessLookupError):
            continue
        if marked and alive and folder.name != str(os.getpid()):
            found.append(int(folder.name))
    return found


def wait_for(condition: Callable[[], object]) -> None:
    until = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)


def python(source: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(source), *map(str, arguments)]


def supervised(folder: Path, *tasks: ProcessSpec, restarts: int = 0) -> tuple[Supervisor, list[str]]:
    told: list[str] = []
    return Supervisor(tasks, folder, restarts, told.append), told


# a process that notes each of its starts in a file and then, the first few times, fails in some way
FAILING = """
    import os, signal, sys
    path, times, how = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    with open(path, "a") as file:
        file.write("x")
    print("began", flush=True)
    if os.path.getsize(path) <= times:
        print("about to fail", file=sys.stderr, flush=True)
        sys.exit(3) if how == "exit" else os.kill(os.getpid(), signal.SIGKILL)
"""


# ---- restarts


@pytest.mark.parametrize("how", ["exit", "kill"])
def test_what_fails_is_started_again_and_the_others_go_on(tmp_path: Path, how: str):
    steady = python("import sys, time\nopen(sys.argv[1], 'a').write('x')\ntime.sleep(1)", tmp_path / "steady")
    failing = python(FAILING, tmp_path / "failing", 2, how)
    supervisor, told = supervised(tmp_path, ProcessSpec("good", steady), ProcessSpec("bad", failing), restarts=2)
    supervisor.run()
    assert (tmp_path / "steady").read_text() == "x"
    assert (tmp_path / "failing").read_text() == "xxx"
    ended = "ended with exit status 3" if how == "exit" else "was ended by SIGKILL"
    assert told == [f"bad {ended}, starts again in 0 s ({n} of 2): about to fail" for n in (1, 2)]
    assert supervisor.states() == {"good": "done", "bad": "done, restarts: 2"}
    log = (tmp_path / "bad.txt").read_text()
    heads = re.findall(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (attempt \d of 3)\nbegan$", log, re.MULTILINE)
    assert heads == ["attempt 1 of 3", "attempt 2 of 3", "attempt 3 of 3"]


def test_an_end_with_status_0_before_the_work_is_done_is_a_failure(tmp_path: Path):
    """As when code that a process runs for the user calls os._exit(0)."""
    starts = python("import sys\nopen(sys.argv[1], 'a').write('x')", tmp_path / "starts")
    done = lambda: (tmp_path / "starts").read_text() == "xxx"  # noqa: E731
    supervisor, told = supervised(tmp_path, ProcessSpec("early", starts, finished=done), restarts=2)
    supervisor.run()
    early = "early ended with exit status 0 before its work was done"
    assert told == [f"{early}, starts again in 0 s ({n} of 2)" for n in (1, 2)]
    supervisor, _ = supervised(tmp_path, ProcessSpec("early", starts, finished=lambda: False), restarts=1)
    with pytest.raises(ChildProcessError, match=f"{early}, restarts: 1"):
        supervisor.run()


def test_a_process_that_asks_to_be_started_again_has_not_failed(tmp_path: Path):
    asks = python(
        f"""
        import os, sys
        open(sys.argv[1], "a").write("x")
        print("error: stuck", flush=True)
        os._exit(0 if os.path.getsize(sys.argv[1]) > 3 else {START_AGAIN})
        """,
        tmp_path / "starts",
    )
    supervisor, told = supervised(tmp_path, ProcessSpec("worker", asks), restarts=0)
    supervisor.run()
    assert told == ["worker is started again, as it asked: error: stuck"] * 3
    assert supervisor.states() == {"worker": "done, restarts: 3"}


def test_a_process_that_would_fail_again_is_not_started_again(tmp_path: Path):
    gives_up = python(
        f"""
        import os, sys
        open(sys.argv[1], "a").write("x")
        print("error: no score", flush=True)
        os._exit({FINAL} if os.path.getsize(sys.argv[1]) > 1 else 1)
        """,
        tmp_path / "starts",
    )
    supervisor, told = supervised(tmp_path, ProcessSpec("trainer", gives_up), restarts=5)
    with pytest.raises(ChildProcessError, match=r"trainer ended with exit status 78, restarts: 1; (?s:.*)no score"):
        supervisor.run()
    assert len(told) == 1 and (tmp_path / "starts").read_text() == "xx"


# serves until SIGTERM; says which signals came, and whether what asked it was still there
SERVICE = """
    import os, signal, sys, time
    out = open(sys.argv[1], "a")
    def note(number, frame):
        print(signal.Signals(number).name, os.path.exists(sys.argv[2]), file=out, flush=True)
        if number == signal.SIGTERM:
            sys.exit(0)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)
    print("serves", file=out, flush=True)
    time.sleep(1000)
"""


def test_a_service_ends_after_all_others_have(tmp_path: Path):
    service = ProcessSpec("service", python(SERVICE, tmp_path / "said", tmp_path / "ended"), service=True)
    last = python("import time, sys\ntime.sleep(1)\nopen(sys.argv[1], 'w').close()", tmp_path / "ended")
    supervisor, told = supervised(tmp_path, service, ProcessSpec("short", python("")), ProcessSpec("long", last))
    supervisor.run()
    assert (tmp_path / "said").read_text().split() == ["serves", "SIGTERM", "True"] and told == []


def test_a_stopped_run_keeps_its_services_until_the_others_have_saved(tmp_path: Path):
    service = ProcessSpec("service", python(SERVICE, tmp_path / "said", tmp_path / "saved"), service=True)
    saves = """
        import signal, sys, time
        def save(*_):
            time.sleep(0.5)
            open(sys.argv[1], "w").close()
            sys.exit(130)
        signal.signal(signal.SIGINT, save)
        open(sys.argv[1] + "-ready", "w").close()
        time.sleep(1000)
    """
    supervisor, _ = supervised(tmp_path, service, ProcessSpec("trainer", python(saves, tmp_path / "saved")))

    def stop() -> None:
        if (tmp_path / "saved-ready").exists() and (tmp_path / "said").exists() and (tmp_path / "said").read_text():
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        supervisor.run(stop)
    assert (tmp_path / "said").read_text().split() == ["serves", "SIGTERM", "True"]


def test_a_service_that_ends_by_itself_has_failed(tmp_path: Path):
    tasks = [
        ProcessSpec("service", python(""), service=True),
        ProcessSpec("long", python("import time; time.sleep(60)")),
    ]
    supervisor, told = supervised(tmp_path, *tasks, restarts=1)
    with pytest.raises(ChildProcessError, match=r"service ended with exit status 0 before .*, restarts: 1"):
        supervisor.run()
    assert told == ["service ended with exit status 0 before its work was done, starts again in 0 s (1 of 1)"]


def test_one_failure_too_many_ends_all_in_order_and_the_error_names_it(tmp_path: Path):
    saving = python(
        """
        import signal, sys, time
        def save(*_):
            time.sleep(0.5)
            open(sys.argv[1], "w").write("saved")
            sys.exit(0)
        signal.signal(signal.SIGINT, save)
        print("ready", flush=True)
        time.sleep(1000)
        """,
        tmp_path / "saved",
    )
    failing = python(
        """
        import os, sys, time
        while not (os.path.exists(sys.argv[1]) and "ready" in open(sys.argv[1]).read()):
            time.sleep(0.01)
        print("\\n".join(f"line {i}" for i in range(20)))
        sys.exit(7)
        """,
        tmp_path / "saving.txt",
    )
    supervisor, _ = supervised(tmp_path, ProcessSpec("saving", saving), ProcessSpec("failing", failing), restarts=1)
    with pytest.raises(ChildProcessError) as stop:
        supervisor.run()
    assert str(stop.value).splitlines() == [
        f"failing ended with exit status 7, restarts: 1; the end of {tmp_path / 'failing.txt'}:",
        *(f"line {i}" for i in range(10, 20)),
    ]
    assert (tmp_path / "saved").read_text() == "saved"


def test_an_error_shows_nothing_of_an_earlier_attempt(tmp_path: Path):
    once = "import os, sys\nfirst = not os.path.exists(sys.argv[1])\nopen(sys.argv[1], 'w')\n"
    failing = python(once + "print('old') if first else None\nsys.exit(1)", tmp_path / "begun")
    supervisor, _ = supervised(tmp_path, ProcessSpec("failing", failing), restarts=1)
    with pytest.raises(ChildProcessError) as stop:
        supervisor.run()
    assert str(stop.value).endswith("failing.txt:\n")


def test_delays_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(supervisor, "LONGEST_DELAY", 3.0)
    supervisor_, told = supervised(tmp_path, ProcessSpec("bad", ["false"]), restarts=9)
    task = supervisor_.tasks[0]
    for failures in (1, 2, 3, 4):
        task.start(10)
        wait_for(lambda: task.members[0].process.wait() == 1)
        failed = task.failed()
        assert failed is not None and task.failures == failures
        supervisor_._after_failure(task, failed)
    assert [re.search(r"in (\d+) s", line)[1] for line in told] == ["1", "2", "3", "3"]


# ---- ranks


RANK = """
    import os, sys, time
    folder, rank, attempt = sys.argv[1], os.environ["RANK"], os.environ["ATTEMPT"]
    open(f"{folder}/{attempt}-{rank}", "w").write(os.environ["WORLD_SIZE"])
    if attempt == "0":
        if rank == "1":
            while not os.path.exists(f"{folder}/0-0"):
                time.sleep(0.01)
            sys.exit(1)
        time.sleep(1000)  # in a collective whose other side is gone
"""


def test_ranks_fail_together_and_start_together_elsewhere(tmp_path: Path):
    def environments(attempt: int) -> list[dict[str, str]]:
        return [{"RANK": str(rank), "WORLD_SIZE": "2", "ATTEMPT": str(attempt)} for rank in range(2)]

    supervisor, told = supervised(tmp_path, ProcessSpec("main", python(RANK, tmp_path), environments), restarts=1)
    supervisor.run()
    assert told == ["main-1 ended with exit status 1, starts again in 0 s (1 of 1)"]
    begun = sorted(path.name for path in tmp_path.glob("[01]-[01]"))
    assert begun == ["0-0", "0-1", "1-0", "1-1"]
    assert [(tmp_path / f"main-{rank}.txt").read_text().count("attempt") for rank in range(2)] == [2, 2]


# ---- the end: no process is left


def test_what_a_process_started_is_ended_with_it(tmp_path: Path, mark: str):
    source = "import os, subprocess\nsubprocess.Popen(['sleep', '1000'])\nos.abort()"
    supervisor, _ = supervised(tmp_path, ProcessSpec("tool", python(source)), restarts=1)
    with pytest.raises(ChildProcessError, match="tool was ended by SIGABRT"):
        supervisor.run()
    assert survivors(mark) == []


STUBBORN = """
    import signal, sys, time
    for number in map(int, sys.argv[2:]):
        signal.signal(number, signal.SIG_IGN)
    open(sys.argv[1], "w")
    time.sleep(1000)
"""


@pytest.mark.parametrize("ignored", [(), (signal.SIGINT,), (signal.SIGINT, signal.SIGTERM)], ids=len)
def test_who_does_not_heed_is_killed(tmp_path: Path, mark: str, monkeypatch, ignored):
    monkeypatch.setattr(supervisor, "LAST_GRACE", 0.3)
    before = signal.getsignal(signal.SIGINT)  # ignored, if the tests run in the background
    stubborn = ProcessSpec("stubborn", python(STUBBORN, tmp_path / "ready", *map(int, ignored)))
    supervisor_, told = supervised(tmp_path, stubborn)

    def tick() -> None:
        if (tmp_path / "ready").exists():
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        supervisor_.run(tick, grace=0.3)
    assert survivors(mark) == []
    assert told == ["finishing this step and saving; press again to stop at once"]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_does_not_wait_for_the_grace(tmp_path: Path, mark: str):
    stubborn = ProcessSpec("stubborn", python(STUBBORN, tmp_path / "ready", int(signal.SIGINT)))
    supervisor_, told = supervised(tmp_path, stubborn)

    def press() -> None:
        wait_for((tmp_path / "ready").exists)
        os.kill(os.getpid(), signal.SIGINT)
        wait_for(lambda: told)
        os.kill(os.getpid(), signal.SIGTERM)  # this soon it counts as the same request
        time.sleep(2 * AGAIN)
        assert survivors(mark) != []
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    with pytest.raises(Interrupted):
        supervisor_.run(grace=1e9)
    thread.join()


@pytest.mark.parametrize("nohup", [True, False])
def test_a_closed_terminal_ends_all_but_under_nohup(tmp_path: Path, nohup: bool):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
    supervisor_, _ = supervised(tmp_path, ProcessSpec("sleeper", ["sleep", "1"]))
    try:
        with nullcontext() if nohup else pytest.raises(Interrupted):
            supervisor_.run(lambda: os.kill(os.getpid(), signal.SIGHUP))
        assert (supervisor_.states()["sleeper"] == "done") == nohup
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_error_in_what_watches_leaves_no_process(tmp_path: Path, mark: str):
    supervisor_, _ = supervised(tmp_path, ProcessSpec("sleeper", ["sleep", "1000"]))

    def tick() -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        supervisor_.run(tick)
    assert survivors(mark) == []


CHILD = """
    from mgrpo.engine.system.process import die_with_launcher
    die_with_launcher()
    import os, signal, subprocess, sys, time
    subprocess.Popen(["sleep", "1000"])
    open(f"{sys.argv[1]}/{os.getpid()}", "w")
    how = sys.argv[2]
    if how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "deaf":
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
    while True:
        time.sleep(1) if how != "busy" else None
"""
LAUNCHER = """
    import sys
    from pathlib import Path
    from mgrpo.engine.system.supervisor import Supervisor, ProcessSpec
    folder, child, how = sys.argv[1:]
    two_ranks = lambda attempt: ({}, {})
    command = [sys.executable, "-c", child, folder, how]
    specs = [ProcessSpec("worker", command), ProcessSpec("trainer", command, two_ranks)]
    Supervisor(specs, Path(folder), 3, print).run()
"""


@pytest.mark.parametrize("how", ["sleep", "busy", "deaf", "stop"])
def test_when_the_launcher_is_killed_all_die_and_what_they_started(tmp_path: Path, mark: str, how: str):
    launcher = subprocess.Popen(python(LAUNCHER, tmp_path, textwrap.dedent(CHILD), how))
    wait_for(lambda: len(list(tmp_path.glob("[0-9]*"))) == 3)
    assert len(marked_processes(mark)) == 7  # three, the tool of each, and the launcher
    launcher.kill()
    launcher.wait()
    wait_for(lambda: not marked_processes(mark))


def test_a_process_that_begins_after_its_launcher_died_ends(tmp_path: Path, mark: str):
    read, write = os.pipe()
    os.close(write)
    command = python(
        "from mgrpo.engine.system.process import die_with_launcher\ndie_with_launcher()\nimport time\ntime.sleep(1000)"
    )
    environment = {**os.environ, "MGRPO_LIFELINE": str(read)}
    orphan = subprocess.Popen(command, env=environment, pass_fds=[read], process_group=0)
    os.close(read)
    assert orphan.wait(SECONDS) == -signal.SIGKILL


def test_without_a_launcher_a_process_lives_its_own_life():
    source = (
        "from mgrpo.engine.system.process import die_with_launcher\ndie_with_launcher()\nimport time\ntime.sleep(0.5)"
    )
    subprocess.run(python(source), check=True)


def test_nothing_that_a_process_starts_itself_holds_the_pipe(tmp_path: Path):
    source = """
        from mgrpo.engine.system.process import LIFELINE, die_with_launcher
        import os, subprocess, sys
        end = os.environ[LIFELINE]
        die_with_launcher()
        listed = subprocess.run(["ls", "/proc/self/fd"], capture_output=True, text=True, close_fds=False).stdout.split()
        assert end not in listed and LIFELINE not in os.environ
    """
    supervisor, _ = supervised(tmp_path, ProcessSpec("worker", python(source)))
    supervisor.run()
