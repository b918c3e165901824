"""Test calls of the user's code: in which thread it runs, what it may raise, what it may not hold up."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cases.episodes import in_time
from mgrpo.engine.environment import calls, limits, threads
from mgrpo.engine.environment.base import Environment, ToolError
from mgrpo.engine.environment.calls import UserCode, UserCodeError
from mgrpo.engine.environment.limits import TimeLimit
from mgrpo.engine.environment.loop import run_loop
from mgrpo.engine.environment.loop_watch import LoopWatch
from mgrpo.engine.environment.threads import StuckError
from mgrpo.engine.system.process import StopNow
from mgrpo.engine.types import Call, CallScore, Episode, Score, Task, ToolCall

CALL = Call("main", Task("t", {}))
NUMBER: contextvars.ContextVar[int] = contextvars.ContextVar("NUMBER")


class Plain(Environment):
    """Do in `tool` whatever a test gives."""

    def __init__(self, deed: Callable[[], Any] = lambda: "x"):
        self.deed = deed

    def tool(self, call, use):
        return self.deed()


class Async(Plain):
    """Do the same in a coroutine."""

    async def tool(self, call, use):
        result = self.deed()
        return await result if asyncio.iscoroutine(result) else result


def run(work: Any) -> Any:
    """Run a coroutine; one that hangs fails the test."""
    out = []

    async def main() -> None:
        out.append(await work)

    in_time(lambda: run_loop(main(), LoopWatch())).result()
    return out[0]


def use(environment: Environment, code: UserCode | None = None) -> Any:
    return (code or UserCode(environment)).tool(CALL, ToolCall("t", ""))


# ---- threads


def test_quick_plain_functions_share_a_daemon_thread_that_bears_their_name():
    seen = []

    def deed() -> str:
        seen.append(threading.current_thread())
        names.append(threading.current_thread().name)
        return "x"

    names: list[str] = []
    code = UserCode(Plain(deed))

    async def several() -> None:
        for _ in range(5):
            assert await use(code.environment, code) == "x"

    run(several())
    assert len(set(seen)) == 1 and seen[0].daemon and set(names) == {"Plain.tool"}


def test_code_that_must_not_leave_the_main_thread_does_not():
    class Home(Plain):
        in_threads = False

    async def ask() -> tuple[int, int]:
        seen: list[int] = []
        await use(Home(lambda: seen.append(threading.get_ident()) or "x"))
        return seen[0], threading.get_ident()

    mine, loops = run(ask())
    assert mine == loops


def test_context_variables_are_passed_on_and_back():
    def deed() -> str:
        NUMBER.set(NUMBER.get() + 1)
        return "x"

    async def ask() -> int:
        NUMBER.set(1)
        code = UserCode(Plain(deed))
        await use(code.environment, code)
        await use(code.environment, code)
        return NUMBER.get()

    assert run(ask()) == 3


def test_a_plain_function_that_blocks_holds_up_nobody():
    free = threading.Event()

    async def both() -> list[str]:
        first = use(Plain(lambda: free.wait(10) and "first"))
        second = use(Plain(lambda: free.set() or "second"))
        return list(await asyncio.gather(first, second))

    assert run(both()) == ["first", "second"]


def test_in_order_a_slow_function_is_waited_for_before_others_go_on(monkeypatch):
    """So that which turns are sampled together does not depend on how long functions take."""
    monkeypatch.setattr(threads, "QUICK", 0.0)
    events: list[str] = []
    code = UserCode(Plain(), in_order=True)

    def tool(name: str) -> Callable[[], str]:
        return lambda: events.append(name) or threading.Event().wait(0.02) or events.append(name) or "x"

    async def both() -> None:
        await asyncio.gather(*(code.text(tool(name)) for name in "ab"))

    run(both())
    assert events == ["a", "a", "b", "b"]


def test_in_order_a_call_that_begins_when_the_time_is_over_is_given_up():
    async def late() -> None:
        async with TimeLimit(0.01):
            threading.Event().wait(0.05)  # tokenising, for example
            await use(code.environment, code)

    free = threading.Event()
    code = UserCode(Plain(lambda: free.wait(10) and "x"), in_order=True)
    with pytest.raises(TimeoutError):
        run(late())
    free.set()


def stuck_code(free: threading.Event, number: int) -> UserCode:
    """Return code of which `number` calls were given up and still run."""
    code = UserCode(Plain(lambda: free.wait(10) and "x"))

    async def give_up() -> None:
        try:
            async with TimeLimit(0.01):
                await use(code.environment, code)
        except (TimeoutError, UserCodeError):
            pass

    async def several() -> None:
        await asyncio.gather(*(give_up() for _ in range(number)))

    run(several())
    return code


def test_calls_that_do_not_return_are_counted_until_they_do(monkeypatch):
    monkeypatch.setattr(threads, "STUCK", 3)
    free = threading.Event()
    code = stuck_code(free, 2)
    code.threads.check()
    assert len(code.threads.stuck) == 2
    other = stuck_code(free, 3)
    with pytest.raises(StuckError, match=r"environment: 3 calls of Plain\.tool were given up and have not returned"):
        other.threads.check()
    free.set()
    while code.threads.stuck or other.threads.stuck:
        pass
    other.threads.check()


def test_threads_are_bounded_and_a_call_without_one_fails(monkeypatch):
    monkeypatch.setattr(threads, "MOST", 3)
    monkeypatch.setattr(threads, "STUCK", 3)
    free = threading.Event()
    code = stuck_code(free, 5)
    assert len(code.threads.stuck) == 3
    with pytest.raises(UserCodeError, match=r"Plain\.tool: not called: 3 calls of Plain\.tool have not returned"):
        run(use(code.environment, code))
    free.set()


def test_calls_beyond_the_bound_wait_for_their_turn(monkeypatch):
    monkeypatch.setattr(threads, "MOST", 2)
    monkeypatch.setattr(threads, "QUICK", 0.0)
    code, running, most = UserCode(Plain()), [0], [0]
    lock = threading.Lock()

    def deed() -> str:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        threading.Event().wait(0.01)
        with lock:
            running[0] -= 1
        return "x"

    async def several() -> list[str]:
        await code.text(deed)  # it is known to be slow now, so the others are not waited for one by one
        return list(await asyncio.gather(*(code.text(deed) for _ in range(8))))

    assert run(several()) == ["x"] * 8 and most[0] == 2


def test_a_thread_that_the_system_refuses_is_a_failure_of_the_call(monkeypatch):
    code = UserCode(Plain())

    def start(self: Any) -> None:
        raise RuntimeError("can't start new thread")

    async def ask() -> Any:
        monkeypatch.setattr(threading.Thread, "start", start)
        try:
            return await use(code.environment, code)
        finally:
            monkeypatch.undo()

    with pytest.raises(UserCodeError, match=r"Plain\.tool: not called: can't start new thread"):
        run(ask())
    assert run(use(code.environment, code)) == "x"


# ---- what it may raise


class Mute(Exception):
    def __str__(self) -> str:
        raise ZeroDivisionError


def deep() -> Any:
    return deep()


def raises(error: BaseException) -> Callable[[], Any]:
    def deed() -> Any:
        raise error

    return deed


KINDS = {
    "ValueError: wrong": raises(ValueError("wrong")),
    "SystemExit: 0": raises(SystemExit(0)),
    "KeyboardInterrupt: ": raises(KeyboardInterrupt()),
    "CancelledError: ": raises(asyncio.CancelledError()),
    "GeneratorExit: ": raises(GeneratorExit()),
    "BaseException: odd": raises(BaseException("odd")),
    "ExceptionGroup: two (1 sub-exception)": raises(ExceptionGroup("two", [ValueError("wrong")])),
    "BaseExceptionGroup: two (1 sub-exception)": raises(BaseExceptionGroup("two", [SystemExit(0)])),
    "MemoryError: ": raises(MemoryError()),
    "Mute: (its text cannot be shown: ZeroDivisionError)": raises(Mute()),
    "RecursionError: maximum recursion depth exceeded": deep,
}


@pytest.mark.parametrize("kind", [Plain, Async])
@pytest.mark.parametrize("told", list(KINDS))
def test_whatever_the_users_code_raises_is_a_failure_of_its_own(kind, told, monkeypatch):
    handler = lambda *_: None  # noqa: E731 (as in every command of ours)
    monkeypatch.setattr(calls.signal, "getsignal", lambda number: handler)
    with pytest.raises(UserCodeError) as caught:
        run(use(kind(KINDS[told])))
    assert str(caught.value).startswith(f"{kind.__name__}.tool: {told}".rstrip())


@pytest.mark.parametrize("kind", [Plain, Async])
def test_a_stop_iteration_is_a_failure_too(kind):
    with pytest.raises(UserCodeError, match="StopIteration"):
        run(use(kind(lambda: next(iter(())))))


def test_a_tool_error_without_a_text_is_read_as_such():
    class Silent(ToolError):
        def __str__(self) -> str:
            raise ZeroDivisionError

    assert run(use(Plain(raises(Silent())))) == "error: (its text cannot be shown: ZeroDivisionError)"


def test_a_second_ctrl_c_in_the_middle_of_user_code_is_no_failure_of_it():
    with pytest.raises(StopNow):
        run(use(Async(raises(StopNow()))))


def test_a_task_that_was_cancelled_elsewhere_is_a_failure():
    async def deed() -> str:
        inner = asyncio.create_task(asyncio.sleep(10))
        inner.cancel()
        await inner
        return "x"

    with pytest.raises(UserCodeError, match=r"Async\.tool: CancelledError"):
        run(use(Async(deed)))


@pytest.mark.parametrize("kind", [Plain, Async])
@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a\ud83d", r"text with '\\ud83d' at 1 returned: expected text that UTF-8 can express"),
        (b"x", "bytes returned: expected str"),
        (iter("x"), "str_ascii_iterator returned: expected str"),
    ],
)
def test_what_is_no_text_is_refused(kind, text, told):
    with pytest.raises(UserCodeError, match=rf"{kind.__name__}\.tool: {told}"):
        run(use(kind(lambda: text)))


# ---- time


async def stubborn(began: asyncio.Event) -> str:
    """Catch every cancellation, as a loop of retries with a bare except does."""
    while True:
        try:
            began.set()
            await asyncio.sleep(10)
        except asyncio.CancelledError:
            pass


def test_a_coroutine_that_catches_its_cancellation_is_left_behind(monkeypatch):
    monkeypatch.setattr(limits, "CLEANUP", 0.02)

    async def ask() -> str:
        try:
            async with TimeLimit(0.02):
                await use(Async(lambda: stubborn(asyncio.Event())))
        except TimeoutError:
            return "given up"
        return "ended"

    assert run(ask()) == "given up"


def test_a_cancelled_coroutine_may_clean_up(monkeypatch):
    done: list[str] = []

    async def tidy() -> str:
        try:
            await asyncio.sleep(10)
        finally:
            await asyncio.sleep(0.01)
            done.append("tidied")
        return "x"

    async def ask() -> None:
        with pytest.raises(TimeoutError):
            async with TimeLimit(0.01):
                await use(Async(tidy))

    run(ask())
    assert done == ["tidied"]


def test_limits_of_the_users_own_work_as_they_do_elsewhere():
    async def patient() -> str:
        for _ in range(3):
            try:
                async with asyncio.timeout(0.005):
                    await asyncio.sleep(10)
            except TimeoutError:
                pass
        return "x"

    async def ask() -> str:
        async with TimeLimit(5.0):
            return await use(Async(patient))

    assert run(ask()) == "x"


def test_only_the_users_code_counts_where_a_machine_may_be_slow():
    async def ask() -> str:
        async with TimeLimit(0.2, of_code=True):
            await asyncio.sleep(0.4)  # a sampler is at work
            await use(Async(lambda: "x"))
            await use(Async(lambda: asyncio.sleep(10, "y")))
        return "ended"

    with pytest.raises(TimeoutError):
        run(ask())


# ---- the event loop


def test_a_task_of_the_users_code_that_exits_ends_only_itself(caplog):
    async def main() -> None:
        asyncio.get_running_loop().create_task(leave())
        await asyncio.sleep(0.02)
        ended.append(True)

    async def leave() -> None:
        raise SystemExit(0)

    ended: list[bool] = []
    with caplog.at_level(logging.ERROR):
        in_time(lambda: run_loop(main(), LoopWatch())).result()
    assert ended == [True] and "a task of its own raised SystemExit" in caplog.text


def test_a_loop_that_the_users_code_stops_goes_on():
    async def main() -> None:
        asyncio.get_running_loop().stop()
        await asyncio.sleep(0.01)
        ended.append(True)

    ended: list[bool] = []
    in_time(lambda: run_loop(main(), LoopWatch())).result()
    assert ended == [True]


def test_neither_threads_nor_tasks_that_do_not_end_hold_up_the_loops_end(monkeypatch):
    monkeypatch.setattr("mgrpo.engine.environment.loop.CLEANUP", 0.02)
    free = threading.Event()

    async def main() -> None:
        tasks.append(asyncio.create_task(asyncio.to_thread(free.wait)))
        await asyncio.sleep(0.01)

    tasks: list[Any] = []
    in_time(lambda: run_loop(main(), LoopWatch())).result()
    free.set()


# ---- judges


def episode() -> Episode:
    return Episode(Call("main", Task("t", {})), [Call("clerk", Task("t", {}))])


class Judge(Environment):
    """Score with what a test gives, one after the other."""

    def __init__(self, *results: Any):
        self.results = list(results)
        self.asked: list[Episode] = []

    def score(self, episode):
        self.asked.append(episode)
        result = self.results.pop(0)
        if isinstance(result, Exception):
            raise result
        return result


SCORE = Score(True, 0.5, (CallScore(True, 0.5),))


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(calls, "PAUSE", 0.0)


def test_a_judge_that_fails_is_asked_again_with_the_episode_as_it_was(quick):
    judge = Judge(OSError("busy"), None, SCORE)
    made: list[Episode] = []

    def fresh() -> Episode:
        made.append(episode())
        return made[-1]

    assert run(UserCode(judge, tries=3).ask_score(fresh, 10.0)) == SCORE
    assert [id(one) for one in judge.asked] == [id(one) for one in made[1:]]


def test_its_tries_are_counted(quick):
    judge = Judge(*[OSError("busy")] * 9)
    with pytest.raises(UserCodeError, match=r"Judge\.score: OSError: busy"):
        run(UserCode(judge, tries=3).ask_score(episode, 10.0))
    assert len(judge.asked) == 3


def test_a_judge_that_is_down_is_not_asked_again_for_ever(quick, monkeypatch):
    monkeypatch.setattr(calls, "SPARE", 2.0)
    judge = Judge(*[OSError("down")] * 30)
    code = UserCode(judge, tries=3)

    async def several() -> None:
        for _ in range(5):
            with pytest.raises(UserCodeError):
                await code.ask_score(episode, 10.0)

    run(several())
    assert len(judge.asked) == 5 + 2


def test_the_pauses_and_tries_of_a_judge_end_with_its_time():
    with pytest.raises(UserCodeError, match=r"score: no result within reward\.timeout = 0\.05 s"):
        run(UserCode(Judge(OSError("busy"), SCORE), tries=3).ask_score(episode, 0.05))


@pytest.mark.parametrize("correct", [10**400, np.timedelta64(1, "s"), 1j, float("nan"), "1", None, True + 0j])
def test_a_score_that_no_reward_can_be_made_of_is_a_failure(correct):
    with pytest.raises(UserCodeError, match=r"score: correct is .*: expected a finite number"):
        run(UserCode(Judge(Score(True, correct, (CallScore(True, 0.5),)))).ask_score(episode, 10.0))


def test_an_evaluation_needs_no_more_than_the_correctness():
    without = Score(None, 0.25, None)  # type: ignore[arg-type]
    assert run(UserCode(Judge(without)).ask_correct(episode, 10.0)).correct == 0.25
    with pytest.raises(UserCodeError, match="score: correct is nan"):
        run(UserCode(Judge(Score(True, float("nan")))).ask_correct(episode, 10.0))


def test_an_environment_may_say_how_correctness_alone_is_found():
    class Quick(Judge):
        async def correct(self, episode):
            return 0.75 if episode.task.id == "t" else 0.0

    judge = Quick()
    assert run(UserCode(judge).ask_correct(episode, 10.0)).correct == 0.75 and not judge.asked


class Unseen:
    """Cannot be looked at."""

    @property
    def __class__(self) -> Any:  # type: ignore[override]
        raise RuntimeError("no")


def test_an_object_that_cannot_be_looked_at_is_a_failure():
    with pytest.raises(UserCodeError, match="RuntimeError: no"):
        run(use(Plain(Unseen)))
