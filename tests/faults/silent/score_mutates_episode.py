"""A judge (`score`) that sorts, pops or renames an episode's calls changes what is recorded, silently.

`score` gets the live episode: trajectories vanish or are filed as another agent's. A judge that appends a call ends
the run by an IndexError.
"""

from mgrpo.engine.rollout.records import write_rollouts
from mgrpo.engine.run.trajectories import TrajectoryWriter
from mgrpo.engine.types import Call, CallScore, Score
from reproduction import fault, held
from reproduction.episodes import Base, check_healthy_episodes, play
from reproduction.runs import new_folder


def scores(episode):
    return Score(True, 1.0, tuple(CallScore(True, 0.5) for _ in episode.calls))


def pops(self, episode):
    episode.calls.pop()  # "only the last report counts"
    return scores(episode)


def renames(self, episode):
    for call in episode.calls:
        call.agent = "main"
    return scores(episode)


def appends(self, episode):
    episode.calls.append(Call("clerk", episode.task))
    return scores(episode)


check_healthy_episodes()
bad = []
for judge in (pops, renames, appends):
    rollouts = play(type("E", (Base,), {"score": judge})())
    writers = {name: TrajectoryWriter(str(new_folder()), name) for name in ("main", "clerk")}
    try:
        ended, calls = write_rollouts(writers, rollouts)
    except Exception as error:
        bad.append(f"{judge.__name__}: {type(error).__name__}: {error} ends the run")
        continue
    scored = sum(r.status == "scored" for r in ended)
    agents = sorted(call.agent for call in calls)
    if scored and agents != ["clerk"] * scored + ["main"] * scored:
        bad.append(f"{judge.__name__}: {scored} rollouts of one call of main and one of clerk, recorded: {agents}")
if bad:
    fault("; ".join(bad))
held("the judge cannot change what is recorded")
