"""Define a run's configuration: one TOML file, read strictly.

Every key has its type, its bounds, its default and its meaning here. An unknown key, a wrong type or a value out of
bounds is a `ValueError` that names the key, the value and what was expected. Relative paths are relative to the working
directory.

The comment behind a field, or directly above it, is its meaning on the page docs/config.md.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from mgrpo.engine.config.hub_names import is_id, looks_like_id
from mgrpo.engine.config.masks import check_server
from mgrpo.engine.config.reader import apply_override, check_plain, convert
from mgrpo.engine.types import MAIN

Positive = Annotated[float, Meta(gt=0)]
NonNegative = Annotated[float, Meta(ge=0)]
Beta = Annotated[float, Meta(ge=0, lt=1)]
Count = Annotated[int, Meta(ge=1)]
Whole = Annotated[int, Meta(ge=0)]
Name = Annotated[str, Meta(pattern=r"^\w[\w.-]{0,63}$")]  # of a set of tasks
LOGGERS = ("tensorboard", "wandb", "mlflow", "trackio")  # those that are known by name
SQLITE = "sqlite:///"  # how the url of a store in a file begins


class Frozen(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Make a section immutable and refuse unknown keys; the base of all sections."""


class EnvironmentConfig(Frozen):
    """Name the user's Environment class and the arguments it is constructed with."""

    use: str  # the class, as "file.py:Class" or "package.module:Class"
    options: dict[str, Any] = {}  # keyword arguments for the class


class VLLMConfig(Frozen):
    """Sample an agent on vLLM servers instead of in the rollout workers (topologies local and cluster).

    The agent's trainer writes new weights into the servers while they sample: running turns continue with the new
    weights, regardless of sampling.switch. The versions that took part in a call are recorded, and
    algorithm.sampler_cap must be set.
    """

    # URLs of servers that already run; empty: topology "local" starts the servers itself
    urls: list[Annotated[str, Meta(pattern=r"^https?://[^/@]+$")]] = []
    servers: Count = 1  # number of servers that topology "local" starts
    tensor_parallel: Count = 1  # GPUs that share the weights of one server
    data_parallel: Count = 1  # copies of the weights in one server
    gpus: list[
        str
    ] = []  # GPUs for all servers of this agent, as in CUDA_VISIBLE_DEVICES; empty: assigned automatically
    # more arguments for `vllm serve`; for a trained agent none that changes what is sampled, as --watermark does
    arguments: list[str] = []
    # how new weights reach the servers; "auto": chosen by where the GPUs are, and "tcp" for servers given by urls
    transfer: Literal["auto", "tcp", "nccl", "ipc"] = "auto"
    timeout: Positive = 120.0  # seconds without a token, with turns running, after which a server counts as hung
    patience: Positive = 600.0  # seconds to wait while no server is available, for example during startup


class AgentConfig(Frozen):
    """Describe one agent: its weights, how it samples and how it is optimised."""

    # a directory with a transformers causal LM and its tokenizer, or the id of one on a hub, such as "Qwen/Qwen3-0.6B";
    # a directory of that name comes first, unless there is a revision
    model: str
    # branch, tag or commit of a model on a hub; empty: main. It is looked up once, and a resumed run keeps the commit
    revision: Annotated[str, Meta(pattern=r"^[\w./@+-]{0,255}$")] = ""
    # run the Python files of the model's directory, for a model that transformers does not have: they may do whatever
    # you may, in every process of the run, with its tokens and passwords, so read them first
    trust_remote_code: bool = False
    # unpickle the weights of pytorch_model.bin where there are no safetensors: plain tensors only, as far as torch's
    # weights_only keeps its promise, so only from a source that you trust
    allow_pickle: bool = False
    train: bool = True  # whether the rl stage trains the agent; false: its weights stay as they are
    ranks: Count = 1  # processes that train the agent together with topology "local"; elsewhere torchrun decides
    temperature: Positive = 1.0  # sampling temperature, also that of all log-probs in training
    # sample among the likeliest tokens with this total probability; below 1 only for agents that the rl stage does not
    # train, since a trainer's log-probs are those of all tokens
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    # strings that end an action; the end-of-sequence tokens of the tokenizer and of generation_config.json always do
    stop: list[Annotated[str, Meta(min_length=1)]] = []
    max_new_tokens: Count = 64  # largest number of tokens sampled in one turn
    max_turns: Count = 8  # largest number of turns in one call
    max_context: Annotated[int, Meta(ge=2)] = 1024  # largest number of tokens in one call, including the prompt
    vllm: VLLMConfig | None = None  # servers that sample the agent; absent: the rollout workers sample it themselves
    lr: Positive = 1e-6  # learning rate of AdamW, after the warm-up of lr_warmup_steps
    weight_decay: NonNegative = 0.0  # weight decay of AdamW
    betas: tuple[Beta, Beta] = (0.9, 0.95)  # decay rates of AdamW's two moments
    grad_clip: Positive = 1.0  # largest norm of the gradient; longer gradients are scaled down
    lr_warmup_steps: Whole = 0  # number of rl steps in which the learning rate rises linearly to lr
    # what the learning rate does after that: stay, or fall to zero until the last step
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"

    @property
    def on_hub(self) -> bool:
        """Whether the model is that of an id on a hub, not of a directory."""
        return bool(self.revision) or is_id(self.model)


class AlgorithmConfig(Frozen):
    """Set M-GRPO's groups, alignment, advantages and objective (arXiv 2511.13288)."""

    rollouts: Annotated[int, Meta(ge=2)] = 8  # rollouts of each query (K in the paper)
    aligned_calls: Count = 4  # calls per rollout that each sub-agent's loss counts (D in the paper)
    # how a rollout's calls are weighted to aligned_calls: by random copies, by their expected number of copies, or not
    # at all ("none": every call counts once)
    alignment: Literal["sampled", "expected", "none"] = "sampled"
    # what is subtracted from a reward: the group's mean, the mean of the group's other members, or the group's median
    baseline: Literal["mean", "leave_one_out", "median"] = "mean"
    scale: Literal["std", "none"] = "std"  # whether advantages are divided by the group's standard deviation
    std_eps: Positive = 1e-6  # standard deviation of rewards below which all advantages of a group are 0
    # your own estimator in place of baseline and scale, as "file.py:function" or "package.module:function": it maps
    # (rewards, the groups' bounds, weights[, origin]) to advantages
    advantage: str = ""
    # what a trajectory's summed loss is divided by: its own action tokens, all action tokens of the batch, or
    # length_constant
    length_norm: Literal["trajectory", "token", "constant"] = "trajectory"
    length_constant: Positive = 64.0  # the divisor of length_norm = "constant", in action tokens
    # importance ratio: of each token, of the sequence (the geometric mean, GSPO), or of the trajectory (the product)
    importance: Literal["token", "sequence", "trajectory"] = "token"
    clip_low: Annotated[float, Meta(gt=0, lt=1)] = 0.2  # the ratio is clipped below at 1 - clip_low
    clip_high: Positive = 0.28  # the ratio is clipped above at 1 + clip_high
    # for a negative advantage A the objective is at least dual_clip * A (arXiv 1912.09729); absent: no such bound
    dual_clip: Annotated[float, Meta(gt=1)] | None = None
    kl_coef: NonNegative = 0.0  # weight of the KL penalty against the weights that the rl stage began with
    kl: Literal["k1", "k2", "k3"] = "k3"  # estimator of the KL penalty
    entropy_coef: NonNegative = 0.0  # weight of the entropy bonus
    # weight of the balance loss that transformers defines for the routers of a mixture of experts, over all tokens of a
    # step; a model without such a loss is refused unless it is 0
    router_aux_coef: NonNegative = 0.0
    # cap of the truncated importance weight that corrects for differences between sampler and trainer; absent: the two
    # are taken as equal
    sampler_cap: Positive | None = None
    epochs: Count = 1  # optimizer steps on each batch
    # your own loss terms, as "file.py:function" or "package.module:function": it maps (rows, settings) to loss terms,
    # see `mgrpo.kernels.Objective`
    objective: str = ""


class RewardConfig(Frozen):
    """Weight the parts of the reward; an invalid format earns 0 (Eqs. 4-5 of the paper)."""

    main_format: float = 0.1  # of the main agent: weight of its valid format
    main_correct: float = 0.9  # of the main agent: weight of its correctness
    sub_format: float = 0.1  # of a sub-agent: weight of its valid format
    sub_correct: float = 0.4  # of a sub-agent: weight of the main agent's correctness
    sub_expert: float = 0.5  # of a sub-agent: weight of the judge's score of its call
    timeout: Positive = 60.0  # seconds a judge may take before the rollout is left unscored
    tries: Count = 3  # how often a judge that fails is asked for a rollout, within timeout; most fail only now and then


class WarmupConfig(Frozen):
    """Set the supervised stage on scripted episodes, before the rl stage."""

    steps: Whole = 0  # optimizer steps of the warm-up; 0: no warm-up
    episodes: Count = 16  # scripted episodes per step
    lr: Positive = 1e-4  # learning rate of the warm-up


class EvalConfig(Frozen):
    """Set the evaluation on tasks that are not trained on."""

    every: Whole = 0  # number of rl steps between evaluations; 0: only at the start and the end of the rl stage
    questions: Count = 200  # largest number of tasks of each set in one evaluation
    # sets of tasks by the names that the environment's `tasks` knows; the mean of the first one is the score by which
    # the best checkpoint is chosen
    sets: Annotated[tuple[Name, ...], Meta(min_length=1)] = ("held_out",)
    samples: Count = 1  # episodes of each task; several give pass@k for k up to this number
    temperature: NonNegative = 0.0  # of all agents, in place of their own; 0: greedy decoding
    patience: Whole = 0  # evaluations in a row without a better score after which the run ends; 0: it never does


class CheckpointConfig(Frozen):
    """Set how often checkpoints are saved and how many are kept."""

    every: Count = 10  # steps between checkpoints; the last step of each stage is always saved
    keep: Count = 2  # newest checkpoints to keep; older ones are deleted
    best: bool = True  # keep the one with the best held-out score too, if eval.every is set


class StoreConfig(Frozen):
    """Say where the shared store and the run's files are."""

    # where the store is, such as postgresql://user@host/database for agents on several machines; empty: a SQLite file
    # in run_dir
    url: str = ""
    # where the weights and trajectories of this run, and of no other, are written: a path or s3://bucket/run; empty:
    # run_dir
    files: str = ""
    # file with the store's password; empty: the environment variable MGRPO_STORE_PASSWORD. The url must not hold it
    password_file: str = ""
    tls: Literal["auto", "require", "off"] = "auto"  # "auto": require TLS unless the store is on this machine
    lease: Positive = 60.0  # seconds without a sign of life after which another process may take over


class SamplingConfig(Frozen):
    """Set the rollout workers beside the trainers (topologies local and cluster), and the time of an episode (all)."""

    workers: Count = 1  # rollout workers; topology "local" starts them
    # number of rl steps by which sampling may run ahead of the slowest trained agent; 0: strictly on-policy
    max_staleness: Whole = 0
    # when new weights are loaded: between episodes, or also between the turns of running episodes
    switch: Literal["episode", "turn"] = "episode"
    # seconds after which an episode is given up, and a query goes on with the rollouts that it has, if at least 2; in
    # topology colocated and in evaluations only those in which the environment's code runs
    timeout: Positive = 600.0
    # dynamic sampling: replace groups in which no advantage differs from 0, instead of counting them for a step
    refill_zero_std: bool = False
    probe_every: Whole = 1  # published versions between checks of the sampler's log-probs; 0: never
    # largest mean difference in nats between the log-probs of trainer and sampler in such a check; rounding to bf16
    # alone can cause 0.03
    max_gap: Positive = 0.1
    keep_trajectories: bool = True  # false: delete trajectory files once every agent has finished with them


class LogConfig(Frozen):
    """Say where the run's numbers are shown, beside its own metrics.jsonl: docs/logging.md."""

    # "tensorboard", "wandb", "mlflow", "trackio", or your own logger, as "file.py:Class" or "package.module:Class"
    to: tuple[str, ...] = ("tensorboard",)
    project: Annotated[str, Meta(pattern=r"^\w[\w .-]{0,99}$")] = "mgrpo"  # the project or experiment of the run there
    name: Annotated[str, Meta(max_length=100)] = ""  # the run's name there; empty: that of run_dir
    tags: list[Annotated[str, Meta(min_length=1, max_length=64)]] = []  # the run's tags there
    rollouts: Annotated[int, Meta(ge=0, le=32)] = 0  # episodes of each rl step to show there, as text
    patience: Annotated[float, Meta(gt=0, le=3600)] = 60.0  # seconds that a logger gets at the end to send what is left


class ComputeConfig(Frozen):
    """Set the device, number formats and the use of memory."""

    device: str = "auto"  # torch device to compute on; "auto": cuda if there is a GPU, otherwise cpu
    # type of the forward and backward pass; the optimizer's master weights are always float32
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    max_tokens: Count = 4096  # largest number of tokens in one micro-batch
    activation_checkpointing: bool = False  # compute activations again in the backward pass, to save memory
    compile: bool = False  # apply torch.compile to the decoder layers; on a GPU only
    concurrency: Count = 96  # largest number of calls of one agent that are sampled together
    # the most bytes that the loss may take on a GPU for logits and their gradient; absent: 400 MiB to 2.8 GiB, up to a
    # quarter of what is free
    buffer_bytes: Count | None = None


class Config(Frozen):
    """Describe a whole run; the sections below are parts of it."""

    run_dir: str  # directory of the run's checkpoints, metrics, logs and figures
    environment: EnvironmentConfig  # the user's environment
    agents: dict[str, AgentConfig]  # the agents by name; one must be called "main", all others are its sub-agents
    # which processes a run has: one for everything; trainers and rollout workers on this machine; or the same on
    # several machines
    topology: Literal["colocated", "local", "cluster"] = "colocated"
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] = 0  # seed of all random numbers
    deterministic: bool = False  # make two runs agree to the last bit, with slower kernels where that is necessary
    steps: Whole = 20  # steps of the rl stage
    queries_per_step: Count = 8  # number of queries, and so of groups of each agent, per rl step
    algorithm: AlgorithmConfig = AlgorithmConfig()  # groups, advantages and objective
    reward: RewardConfig = RewardConfig()  # weights of the reward's parts
    warmup: WarmupConfig = WarmupConfig()  # the supervised stage before the rl stage
    eval: EvalConfig = EvalConfig()  # evaluation on held-out tasks
    checkpoint: CheckpointConfig = CheckpointConfig()  # how often to save
    compute: ComputeConfig = ComputeConfig()  # device, types and memory
    store: StoreConfig = StoreConfig()  # where the store and the files are
    sampling: SamplingConfig = SamplingConfig()  # rollout workers
    log: LogConfig = LogConfig()  # tools that show the run
    restarts: Whole = 3  # how often the launcher restarts each process of a local run before it gives the run up

    @property
    def colocated(self) -> bool:
        """Whether one process samples the rollouts and trains all agents."""
        return self.topology == "colocated"

    @property
    def subs(self) -> list[str]:
        """Names of the sub-agents, in the file's order."""
        return [name for name in self.agents if name != MAIN]

    @property
    def trained(self) -> list[str]:
        """Names of the agents that the rl stage trains, in the file's order."""
        return [name for name, agent in self.agents.items() if agent.train]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file and apply `key.path=value` overrides, whose values are TOML (a bare word is a string).

    path: the file, or the directory of a run, whose own config is read. Raises ValueError naming the key, the value and
    what was expected.
    """
    path = Path(path)
    if path.is_dir():
        return _load_saved(path, overrides)
    if not path.is_file():
        raise ValueError(f"config: {path} is not a file: expected a TOML file")
    try:
        raw = tomllib.loads(path.read_text())
    except (ValueError, RecursionError) as error:  # no TOML, no UTF-8, a number too long or sections nested too deep
        raise ValueError(f"config: {path} is not valid TOML: {error}") from error
    for override in overrides:
        apply_override(raw, override)
    return _absolute(_check_lengths(parse_config(raw)))


def _load_saved(run_dir: Path, overrides: Sequence[str]) -> Config:
    """Read the config that a run saved in its directory, wherever that is now."""
    file = run_dir / "config.json"
    if not file.is_file():
        raise ValueError(f"config: {run_dir} given: expected a TOML file, or a run's directory with its {file.name}")
    raw = msgspec.to_builtins(read_dump(file.read_text()))
    raw["run_dir"] = str(run_dir)
    for override in overrides:
        apply_override(raw, override)
    return _absolute(_check_lengths(parse_config(raw)))


def parse_config(raw: dict[str, Any]) -> Config:
    """Check a dictionary against the schema above. Raises ValueError as `load_config` does."""
    agents = raw.get("agents")
    if isinstance(agents, dict):
        for name, agent in agents.items():  # one by one, because msgspec does not name the key of a dictionary's value
            parse_agent(name, agent)
    config = convert(raw, Config, "")
    check_plain(raw, "")
    if MAIN not in config.agents:
        raise ValueError(f"config: agents: {sorted(config.agents)} given: expected one named {MAIN!r}")
    for name in config.agents:
        if not name.isidentifier():
            raise ValueError(f"config: agents: {name!r} given: expected a name of letters, digits and underscores")
    if not config.trained and config.steps:
        raise ValueError("config: agents: train = false for all given: expected at least one to train, or steps = 0")
    for name in config.agents:
        _check_revision(name, config.agents[name])
        _check_servers(name, config)
    for name in config.trained if config.steps else []:
        check_trainable(config.agents[name], f"config: agents.{name}")
    check_evaluation(config.eval)
    check_logger_names(config.log.to)
    return config


def parse_agent(name: str, raw: Any) -> AgentConfig:
    """Check one agent's keys. Raises ValueError naming the key, the value and what was expected."""
    return convert(raw, AgentConfig, f"agents.{name}")


def check_evaluation(settings: EvalConfig) -> None:
    """Check that an evaluation's settings suit each other. Raises ValueError naming the key."""
    if len(set(settings.sets)) < len(settings.sets) or settings.sets[0] == "train":
        given = list(settings.sets)
        raise ValueError(f"config: eval.sets: {given} given: expected each name once, and not 'train' first")
    if settings.samples > 1 and not settings.temperature:
        raise ValueError(
            f"config: eval.samples: {settings.samples} given with eval.temperature = 0: expected a temperature above "
            "0, since greedy decoding samples the same answer each time"
        )
    if settings.patience and not settings.every:
        raise ValueError(f"config: eval.patience: {settings.patience} given with eval.every = 0: expected more than 0")


def check_trainable(agent: AgentConfig, key: str) -> None:
    """Check that an agent samples from the distribution that it is trained under.

    key: what the error puts before the keys. Raises ValueError naming the key, the value and what was expected.
    """
    if agent.top_p < 1:
        raise ValueError(
            f"{key}.top_p: {agent.top_p} given: expected 1 for an agent that is trained, because the trainer's "
            "log-probs are those of all tokens, not of the likeliest ones: "
            f"lower {key.removeprefix('config: ')}.temperature instead, or set train = false"
        )
    if agent.vllm is not None:
        check_server(agent.vllm.arguments, f"{key}.vllm.arguments")


def _check_lengths(config: Config) -> Config:
    """Check that the longest call that an agent may learn from fits into a micro-batch; return the config."""
    longest = {name: agent.max_context - 1 for name, agent in config.agents.items()}  # the last token predicts nothing
    for name in config.agents if config.warmup.steps else config.trained if config.steps else []:
        if config.compute.max_tokens < longest[name]:
            raise ValueError(
                f"config: compute.max_tokens: {config.compute.max_tokens} given: expected at least {longest[name]}, "
                f"since agents.{name}.max_context = {longest[name] + 1} lets a call become that long"
            )
    return config


def check_logger_names(loggers: Sequence[str]) -> None:
    """Check that each logger is known by its name or is an import path, and that no two write to the same place."""
    for to in loggers:
        if to not in LOGGERS and (not re.fullmatch(r".+:[A-Za-z_]\w*", to) or to.rpartition(":")[2] in LOGGERS):
            raise ValueError(
                f"config: log.to: {to!r} given: expected one of {', '.join(LOGGERS)}, or your own class as "
                "file.py:Class or package.module:Class"
            )
    names = [to.rpartition(":")[2] for to in loggers]
    if len(set(names)) < len(names):
        raise ValueError(f"config: log.to: {list(loggers)} given: expected each logger once")


def _check_revision(name: str, agent: AgentConfig) -> None:
    if agent.revision and not looks_like_id(agent.model):
        raise ValueError(
            f"config: agents.{name}.revision: {agent.revision!r} given with model = {agent.model!r}: expected none for "
            "a directory, or the id of a model on a hub, such as 'Qwen/Qwen3-0.6B'"
        )


def _check_servers(name: str, config: Config) -> None:
    """Check that the other sections suit an agent's servers."""
    vllm, key = config.agents[name].vllm, f"config: agents.{name}.vllm"
    if vllm is None:
        return
    if config.colocated:
        raise ValueError(f"{key}: given with topology = 'colocated': expected 'local' or 'cluster'")
    if config.agents[name].trust_remote_code:
        raise ValueError(
            f"{key}: given with agents.{name}.trust_remote_code = true: expected false, because servers never run the "
            "Python of a model's directory"
        )
    if config.topology == "cluster" and not vllm.urls:
        raise ValueError(
            f"{key}.urls: [] given: expected the servers' URLs, which only topology = 'local' starts itself"
        )
    expected = vllm.servers * vllm.tensor_parallel * vllm.data_parallel
    if vllm.gpus and len(vllm.gpus) != expected:
        raise ValueError(
            f"{key}.gpus: {vllm.gpus} given: expected {expected}, which is servers x tensor_parallel x data_parallel"
        )
    if config.algorithm.sampler_cap is None:
        raise ValueError(
            f"{key}: given without algorithm.sampler_cap: expected a number, such as 2.0: the log-probs of servers "
            "differ slightly from the trainer's, and weights may change within a turn"
        )


def dump_config(config: Config) -> str:
    """Return the configuration as JSON, with every default written out."""
    return msgspec.json.format(msgspec.json.encode(config), indent=2).decode()


def read_dump(text: str) -> Config:
    """Return the configuration that `dump_config` wrote. Raises ValueError if it cannot be read."""
    try:
        return msgspec.json.decode(text, type=Config)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ValueError(f"config.json is damaged, or of another version of mgrpo: {error}") from error


def _absolute(config: Config) -> Config:
    """Make paths absolute, so that the run does not depend on the working directory later."""
    agents = {
        name: agent if agent.on_hub else msgspec.structs.replace(agent, model=_directory(name, agent.model))
        for name, agent in config.agents.items()
    }
    use = _absolute_name("environment.use", config.environment.use)
    environment = msgspec.structs.replace(config.environment, use=use)
    given = {key: getattr(config.algorithm, key) for key in ("advantage", "objective")}
    own = {key: _absolute_name(f"algorithm.{key}", name) for key, name in given.items()}
    algorithm = msgspec.structs.replace(config.algorithm, **own)
    run_dir = _resolved("run_dir", config.run_dir)
    return msgspec.structs.replace(
        config,
        run_dir=run_dir,
        agents=agents,
        environment=environment,
        algorithm=algorithm,
        log=msgspec.structs.replace(config.log, to=tuple(_absolute_name("log.to", to) for to in config.log.to)),
        store=_absolute_store(config.store),
    )


def _directory(name: str, model: str) -> str:
    return _resolved(f"agents.{name}.model", os.path.expanduser(model))


def _absolute_store(store: StoreConfig) -> StoreConfig:
    files, password_file, url = store.files, store.password_file, store.url
    if files and "://" not in files:
        files = _resolved("store.files", files)
    if password_file:
        password_file = _resolved("store.password_file", password_file)
    file, mark, options = url.removeprefix(SQLITE).partition("?")
    if url.startswith(SQLITE) and file and not file.startswith(":"):  # ":memory:" is refused with the store's reason
        url = f"{SQLITE}{_resolved('store.url', file)}{mark}{options}"
    return msgspec.structs.replace(store, url=url, files=files, password_file=password_file)


def _absolute_name(key: str, use: str) -> str:
    module, _, name = use.rpartition(":")
    return f"{_resolved(key, module)}:{name}" if module.endswith(".py") else use


def _resolved(key: str, text: str) -> str:
    """Return an absolute path. Raises ValueError naming the key for a text that can be none."""
    try:
        path = Path(text).resolve()
    except (ValueError, RuntimeError) as error:  # a null byte, or a loop of links
        raise ValueError(f"config: {key}: {text!r:.80} given: expected a path: {error}") from error
    if any(len(part.encode(errors="surrogateescape")) > 255 for part in path.parts) or len(str(path)) >= 4096:
        raise ValueError(f"config: {key}: {text!r:.80}… given: expected a path of names that a file can have")
    return str(path)
