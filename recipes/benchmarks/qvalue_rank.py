"""What the Q-network of a finished PPO run is worth: does it rank the experts' proposals as their returns do?

    python recipes/benchmarks/qvalue_rank.py RUN_DIR --states 64

``RUN_DIR`` is that of a run of ``recipes/ppo_pmoe.py`` with ``scoring=critic``; its last checkpoint is loaded. In each
state that the policy meets, every expert's proposal goes through the simulator several times, the policy going on with
the same random numbers for every proposal. Spearman's rank correlation over the experts of a state between scores and
mean discounted returns, averaged over states; *reliability* is that between the two halves of the rollouts.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import UsageError, prepare_torch
from ppo_pmoe import NORMALIZATION, Agent, build_agent, critic_scored
from ranking import measure_ranking
from resume import load_components, open_run


def load(run: Path) -> tuple[DictConfig, Agent]:
    """The config of a run, and its agent as the last checkpoint left it."""
    cfg, path = open_run(run)
    if OmegaConf.select(cfg, "normalization") is None or not critic_scored(cfg):
        raise UsageError(f"{run}: must be a run with policy=pmoe and scoring=critic, which has a Q-network")
    agent = build_agent(cfg)
    load_components(path, {"loss_module": agent.loss, f"trainer_module.{NORMALIZATION}": agent.normalization})
    return cfg, agent


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--states", type=int, default=64)
    parser.add_argument("--rollouts", type=int, default=16, help="of every proposal")
    parser.add_argument("--horizon", type=int, default=100, help="steps of a rollout")
    args = parser.parse_args()
    if args.states < 2 or args.rollouts < 2 or args.horizon < 1:
        parser.error("--states and --rollouts must be at least 2, --horizon at least 1")
    try:
        cfg, agent = load(args.run)
    except UsageError as error:
        parser.error(str(error))
    torch.set_num_threads(1)
    prepare_torch(cfg)
    found = measure_ranking(cfg, agent, args.states, rollouts=args.rollouts, horizon=args.horizon)
    print("| run | states | rank correlation | reliability |\n|---|---|---|---|")
    print(
        f"| {args.run.name} | {args.states} | {found.correlation:+.3f} ± {found.standard_error:.3f} "
        f"| {found.reliability:.2f} |"
    )


if __name__ == "__main__":
    main()
