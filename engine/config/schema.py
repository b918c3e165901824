"""A run's configuration: one TOML file, read strictly.

Every key has its type, bounds and default here. An unknown key, a wrong type or a value out of bounds is a `ValueError`
that names the key, the value and what was expected. Relative paths are relative to the working directory.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from mgrpo.engine.config.reader import apply_override, check_plain, convert
from mgrpo.engine.types import MAIN

Positive = Annotated[float, Meta(gt=0)]
NonNegative = Annotated[float, Meta(ge=0)]
Beta = Annotated[float, Meta(ge=0, lt=1)]
Count = Annotated[int, Meta(ge=1)]
Whole = Annotated[int, Meta(ge=0)]


class Frozen(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of all sections: immutable, and no key passes unnoticed."""


class EnvironmentConfig(Frozen):
    """The user's Environment class and what it is constructed with."""

    use: str  # "file.py:Class", or "package.module:Class"
    options: dict[str, Any] = {}


class VLLMConfig(Frozen):
    """vLLM servers that sample an agent, in place of the rollout workers themselves. Topologies local and cluster.

    Its trainer puts new weights into them while they sample: turns that run go on with the new ones, whatever
    sampling.switch says. Which versions had a part in a call is recorded, and algorithm.sampler_cap must be set.
    """

    urls: list[Annotated[str, Meta(pattern=r"^https?://[^/@]+$")]] = []  # that run already; none: `local` starts them
    servers: Count = 1  # that `local` starts
    tensor_parallel: Count = 1  # GPUs that share the weights of one server
    data_parallel: Count = 1  # copies of the weights in one server
    gpus: list[str] = []  # of all its servers together, as CUDA_VISIBLE_DEVICES names them; none: dealt like others
    arguments: list[str] = []  # more for `vllm serve`
    transfer: Literal["auto", "tcp", "nccl", "ipc"] = "auto"  # how weights get there; auto: by the GPUs, with urls tcp
    timeout: Positive = 120.0  # seconds without a token, whatever it was asked, after which a server hangs
    patience: Positive = 600.0  # seconds that none may be there, as when they start


class AgentConfig(Frozen):
    """One agent: its weights, how it samples, how it is optimised."""

    model: str  # a directory with a transformers causal LM and its tokenizer
    train: bool = True  # false: frozen in the rl stage
    ranks: Count = 1  # processes that train it together where each agent has its own (topology local); torchrun counts
    # sampling
    temperature: Positive = 1.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    stop: list[Annotated[str, Meta(min_length=1)]] = []  # an action also ends at the tokenizer's end-of-sequence token
    max_new_tokens: Count = 64  # per turn
    max_turns: Count = 8
    max_context: Annotated[int, Meta(ge=2)] = 1024  # tokens of one call, prompt included
    vllm: VLLMConfig | None = None  # the servers that sample it; absent: the rollout workers do
    # optimisation
    lr: Positive = 1e-6
    weight_decay: NonNegative = 0.0
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    grad_clip: Positive = 1.0  # largest norm of the gradient
    lr_warmup_steps: Whole = 0  # steps of linear rise
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"  # after the rise, to zero when all steps are done


class AlgorithmConfig(Frozen):
    """M-GRPO (arXiv 2511.13288): groups, alignment, advantages and the objective."""

    rollouts: Annotated[int, Meta(ge=2)] = 8  # K, per query
    aligned_calls: Count = 4  # D, per rollout and sub-agent
    alignment: Literal["sampled", "expected", "none"] = "sampled"  # none: every call once, however many a rollout made
    baseline: Literal["mean", "leave_one_out", "median"] = "mean"
    scale: Literal["std", "none"] = "std"
    std_eps: Positive = 1e-6
    advantage: str = ""  # else "file.py:function" of yours: (rewards, groups' bounds, weights[, origin]) -> advantages
    length_norm: Literal["trajectory", "token", "constant"] = "trajectory"
    length_constant: Positive = 64.0  # action tokens; the divisor of length_norm = "constant"
    importance: Literal["token", "sequence", "trajectory"] = "token"
    clip_low: Annotated[float, Meta(gt=0, lt=1)] = 0.2
    clip_high: Positive = 0.28
    dual_clip: Annotated[float, Meta(gt=1)] | None = None
    kl_coef: NonNegative = 0.0  # against the weights the rl stage began with
    kl: Literal["k1", "k2", "k3"] = "k3"
    entropy_coef: NonNegative = 0.0
    sampler_cap: Positive | None = None  # truncated importance weight; null: sampler and trainer are taken as equal
    epochs: Count = 1  # optimizer steps on each batch
    objective: str = ""  # else "file.py:function" of yours: (rows, settings) -> loss terms, see mgrpo.kernels.Objective


class RewardConfig(Frozen):
    """Weights of the reward's parts; an invalid format earns 0 (Eqs. 4-5 of the paper)."""

    main_format: float = 0.1
    main_correct: float = 0.9
    sub_format: float = 0.1
    sub_correct: float = 0.4
    sub_expert: float = 0.5
    timeout: Positive = 60.0  # seconds a judge may take before the rollout stays unscored


class WarmupConfig(Frozen):
    """Supervised stage on scripted episodes, before rl."""

    steps: Whole = 0
    episodes: Count = 16  # per step
    lr: Positive = 1e-4


class EvalConfig(Frozen):
    """Evaluation on held-out tasks, with greedy decoding."""

    every: Whole = 0  # rl steps; 0: at the start and the end of the rl stage only
    questions: Count = 200


class CheckpointConfig(Frozen):
    """How often to save, and how many to keep."""

    every: Count = 10  # steps of a stage; each stage's last step is always saved
    keep: Count = 2


class StoreConfig(Frozen):
    """Where the minimal statistics cross."""

    url: str = ""  # "": sqlite:///<run_dir>/store.db; postgresql://user@host/database for agents on several machines
    files: str = ""  # "": run_dir; where weights and trajectories lie, of this run alone: a path or s3://bucket/run
    password_file: str = ""  # else the environment's MGRPO_STORE_PASSWORD; never in the url
    tls: Literal["auto", "require", "off"] = "auto"  # auto: require for a host that is not this machine
    lease: Positive = 60.0  # seconds without a sign of life after which another may take over


class SamplingConfig(Frozen):
    """Rollout processes beside the trainers (topologies local and cluster)."""

    workers: Count = 1  # that `local` starts
    max_staleness: Whole = 0  # steps by which sampling may run ahead of the slowest trained agent; 0: on-policy
    switch: Literal["episode", "turn"] = "episode"  # running episodes keep their weights, or change between turns
    timeout: Positive = 600.0  # seconds after which a query goes on with the rollouts it has, at least 2
    refill_zero_std: bool = False  # dynamic sampling: groups without any advantage do not count for a step
    probe_every: Whole = 1  # published versions between checks of the sampler's log-probs; 0: never
    max_gap: Positive = 0.1  # nats between trainer and sampler, mean over the probe; bf16 rounding alone can make 0.03
    keep_trajectories: bool = True  # false: files go when all that is in them has been trained on


class ComputeConfig(Frozen):
    """Numbers and memory."""

    device: str = "auto"  # "auto": cuda where there is one, else cpu
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of the forward and backward; master weights are float32
    max_tokens: Count = 4096  # of one micro-batch
    activation_checkpointing: bool = False
    compile: bool = False  # torch.compile of the decoder layers; on a GPU only
    concurrency: Count = 96  # calls of one agent that are sampled together


class Config(Frozen):
    """The whole file."""

    run_dir: str
    environment: EnvironmentConfig
    agents: dict[str, AgentConfig]
    topology: Literal["colocated", "local", "cluster"] = "colocated"
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] = 0
    deterministic: bool = False  # slower kernels where needed; the same run twice gives the same bits
    steps: Whole = 20  # of the rl stage
    queries_per_step: Count = 8
    algorithm: AlgorithmConfig = AlgorithmConfig()
    reward: RewardConfig = RewardConfig()
    warmup: WarmupConfig = WarmupConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    compute: ComputeConfig = ComputeConfig()
    store: StoreConfig = StoreConfig()
    sampling: SamplingConfig = SamplingConfig()
    restarts: Whole = 3  # of each process of a local run, within the run, before it is given up

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

    Raises ValueError naming the key, the value and what was expected.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"config: {path} is no file, expected a TOML file")
    try:
        raw = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"config: {path} is not valid TOML: {error}") from error
    for override in overrides:
        apply_override(raw, override)
    return _absolute(parse_config(raw))


def parse_config(raw: dict[str, Any]) -> Config:
    """Check a dictionary against the schema above."""
    agents = raw.get("agents")
    if isinstance(agents, dict):
        for name, agent in agents.items():  # one by one: the library does not name the key of a dictionary's value
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
        _check_servers(name, config)
    return config


def parse_agent(name: str, raw: Any) -> AgentConfig:
    """Check one agent's keys. Raises ValueError naming the key, the value and what was expected."""
    return convert(raw, AgentConfig, f"agents.{name}")


def _check_servers(name: str, config: Config) -> None:
    """What an agent's servers need of the other sections."""
    vllm, key = config.agents[name].vllm, f"config: agents.{name}.vllm"
    if vllm is None:
        return
    if config.topology == "colocated":
        raise ValueError(f"{key}: given with topology = 'colocated': expected 'local' or 'cluster'")
    if config.topology == "cluster" and not vllm.urls:
        raise ValueError(
            f"{key}.urls: [] given: expected the servers' URLs, which only topology = 'local' starts itself"
        )
    wanted = vllm.servers * vllm.tensor_parallel * vllm.data_parallel
    if vllm.gpus and len(vllm.gpus) != wanted:
        raise ValueError(f"{key}.gpus: {vllm.gpus} given: expected {wanted}, for servers x tensor x data_parallel")
    if config.algorithm.sampler_cap is None:
        raise ValueError(
            f"{key}: given without algorithm.sampler_cap: expected a number, as 2.0: the servers' log-probs are not "
            "quite the trainer's, and weights may change within a turn"
        )


def dump_config(config: Config) -> str:
    """The configuration as JSON, every default written out."""
    return msgspec.json.format(msgspec.json.encode(config), indent=2).decode()


def read_dump(text: str) -> Config:
    """What `dump_config` wrote."""
    return msgspec.json.decode(text, type=Config)


def _absolute(config: Config) -> Config:
    """Paths as given are relative to the working directory; the run must not depend on it later."""
    agents = {
        name: msgspec.structs.replace(agent, model=str(Path(agent.model).resolve()))
        for name, agent in config.agents.items()
    }
    environment = msgspec.structs.replace(config.environment, use=_absolute_name(config.environment.use))
    own = {key: _absolute_name(getattr(config.algorithm, key)) for key in ("advantage", "objective")}
    algorithm = msgspec.structs.replace(config.algorithm, **own)
    run_dir, files = str(Path(config.run_dir).resolve()), config.store.files
    if files and "://" not in files:
        files = str(Path(files).resolve())
    return msgspec.structs.replace(
        config,
        run_dir=run_dir,
        agents=agents,
        environment=environment,
        algorithm=algorithm,
        store=msgspec.structs.replace(config.store, files=files),
    )


def _absolute_name(use: str) -> str:
    module, _, name = use.rpartition(":")
    return f"{Path(module).resolve()}:{name}" if module.endswith(".py") else use
