"""Multi-source environments: sources and modalities, registration, SUMO traffic, a synthetic task with known truth."""

from lacer.envs.described import describe
from lacer.envs.errors import LacerError, UnknownNameError, did_you_mean
from lacer.envs.registration import list_envs, make, register_env, task_card
from lacer.envs.sources import MODALITIES, Modality, Objective, SourceSpec, TaskCard

__all__ = [
    "MODALITIES",
    "LacerError",
    "Modality",
    "Objective",
    "SourceSpec",
    "TaskCard",
    "UnknownNameError",
    "describe",
    "did_you_mean",
    "list_envs",
    "make",
    "register_env",
    "task_card",
]

register_env(
    "lacer/MixedTraffic-v0",
    "lacer.envs.traffic.mixed:MixedTrafficEnv",
    "SUMO motorway with on-ramp, lane drop and incidents; guide connected vehicles (5 sources)",
)
register_env(
    "lacer/MixedTrafficPaper-v0",
    "lacer.envs.traffic.paper:MixedTrafficPaperEnv",
    "the motorway with the three sources of arXiv 2512.06982: time, traffic, sequence",
)
register_env(
    "lacer/TrafficSignal-v0",
    "lacer.envs.traffic_signal.env:TrafficSignalEnv",
    "SUMO junction with lights, on sumo-rl; keep waiting short, favour whom the instruction names (4 sources)",
)
register_env(
    "lacer/KnownSources-v0",
    "lacer.envs.known_sources:KnownSourcesEnv",
    "synthetic, fast: the reward depends on known sources, the others are noise or copies (up to 7 sources)",
)
