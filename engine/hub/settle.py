"""Settle which commit of its models a run uses, once: a resumed run, and each of its processes, uses the same."""

from __future__ import annotations

from pathlib import Path

import msgspec

from mgrpo.engine.config.hub_names import asked, commit_of, pinned, shown
from mgrpo.engine.config.schema import AgentConfig, Config, read_dump
from mgrpo.engine.hub.failures import FAILURES, HubSource, offline
from mgrpo.engine.hub.snapshots import Talk, fetch, look_up, source_of


def settle(config: Config, talk: Talk, saved: Path | None = None, *, weights: bool = True) -> Config:
    """Return the config with the commit of each model on a hub, after fetching what the cache lacks.

    saved: the config.json of the run, if there is one: its commits stay, and it is said if a branch has moved since.
    weights: whether to fetch them too. Raises ValueError naming the agent's model if it cannot be had.
    """
    if not any(agent.on_hub for agent in config.agents.values()):
        return config
    before = read_dump(saved.read_text()).agents if saved and saved.is_file() else {}
    agents: dict[str, AgentConfig] = {}
    for name, agent in config.agents.items():
        if name in before and _same(agent, before[name]):
            agent = msgspec.structs.replace(agent, revision=before[name].revision)
            _tell_if_moved(name, agent, talk)
        for other in agents.values():  # agents that begin as the same model get one commit, also if a branch moves now
            if _same(agent, other):
                agent = msgspec.structs.replace(agent, revision=other.revision)
        agents[name] = _settled(name, agent, talk, weights) if agent.on_hub else agent
    return msgspec.structs.replace(config, agents=agents)


def _settled(name: str, agent: AgentConfig, talk: Talk, weights: bool) -> AgentConfig:
    talk.doing(f"looking for agents.{name}.model: {shown(agent.model, agent.revision)}")
    found = fetch(source_of(name, agent), agent, talk, weights=weights)
    return msgspec.structs.replace(agent, revision=pinned(agent.revision, found.name))


def _same(agent: AgentConfig, before: AgentConfig) -> bool:
    """Return whether another config names the commit for what is asked of the agent now."""
    commit = commit_of(before.revision)
    if not agent.on_hub or commit is None or agent.model != before.model:
        return False
    return asked(agent.revision) in (asked(before.revision), commit)


def _tell_if_moved(name: str, agent: AgentConfig, talk: Talk) -> None:
    """Say that a branch or tag is at another commit now. A hub that does not answer at once is not waited for."""
    branch, commit = asked(agent.revision), str(commit_of(agent.revision))
    if branch == commit or offline():
        return
    try:
        now = look_up(HubSource(agent.model, branch), talk, patient=False).commit
    except FAILURES:
        return
    if now != commit:
        talk.say(
            f"agents.{name}.model: {branch} of {agent.model} is at {now[:7]} by now; the run goes on with "
            f"{commit[:7]}, with which it was begun"
        )
