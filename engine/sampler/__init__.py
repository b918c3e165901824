"""Samplers: what turns the tokens of a call into more tokens."""

from mgrpo.engine.sampler.inprocess import InProcessSampler
from mgrpo.engine.sampler.protocol import Completion, Proof, Sampler, Session

__all__ = ["Completion", "InProcessSampler", "Proof", "Sampler", "Session"]
