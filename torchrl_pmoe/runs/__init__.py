"""A run on disk, and what is seen of it."""

from torchrl_pmoe.runs.acting import CarriedOptionPolicy, Episode, EpisodePlayer, WatchedPolicy, acting
from torchrl_pmoe.runs.card import CARD, AgentResult, source_commit, write_model_card
from torchrl_pmoe.runs.checkpoints import VerifiedCheckpoint
from torchrl_pmoe.runs.directory import DirectoryInUseError, RunDirectory
from torchrl_pmoe.runs.evaluation import Evaluator, RecordedEvaluation, summarize_returns
from torchrl_pmoe.runs.hub import push_to_hub
from torchrl_pmoe.runs.loggers import run_logger
from torchrl_pmoe.runs.metrics import CheckpointLog, MetricsFile, read_metrics
from torchrl_pmoe.runs.policies import LoadedPolicy, PolicyParts, SavedPolicies, construct, load_policy
from torchrl_pmoe.runs.simulators import EpisodeState, SimulatorState

__all__ = [
    "CARD",
    "AgentResult",
    "CarriedOptionPolicy",
    "CheckpointLog",
    "DirectoryInUseError",
    "Episode",
    "EpisodePlayer",
    "EpisodeState",
    "Evaluator",
    "LoadedPolicy",
    "MetricsFile",
    "PolicyParts",
    "RecordedEvaluation",
    "RunDirectory",
    "SavedPolicies",
    "SimulatorState",
    "VerifiedCheckpoint",
    "WatchedPolicy",
    "acting",
    "construct",
    "load_policy",
    "push_to_hub",
    "read_metrics",
    "run_logger",
    "source_commit",
    "summarize_returns",
    "write_model_card",
]
