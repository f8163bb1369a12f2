"""The parts of the benchmark: reward models and PPO against TRL's, and the memory of each stage of ours."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from servers import BenchFailed
from steps import Step
from train_inputs import COMPLETION_TOKENS, SAMPLED_TOKENS, Inputs, PpoInputs
from train_memory import STAGES
from train_peers import PPO_PEER, REWARD_MODEL_PEER, PeerMissing, peer_python
from train_slices import Slice, Trainer, Turn, take_turns, trainer

OURS, UNPACKED, THEIRS, WITH_TEXT = "ours", "ours, unpacked", "TRL", "ours, with text"
FULL_LENGTH, RAGGED = "full", "ragged"
GOALS = {(6, 1): 8.0, (6, 4): 12.0, (6, 16): 18.0}
"""Times TRL's pairs/s, by completions of a prompt and prompt tokens per completion token."""
PPO_GOAL = 2.5
MINIBATCHES = 8
_TOKENS_PER_FORWARD = 2048
"""Of TRL's reward model: of 1, 3, 5 and 15 pairs at once, about so many tokens were its fastest on a CPU."""
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        completions: K of the reward model's cells, with the rounds of each.
        batch_prompts: Prompts of a step by prompt tokens per completion token, at K = 6; at other K fewer or more, so
            that a step of TRL's takes about as long.
        episodes: Of an iteration of PPO.
        ppo_rounds: Of PPO.
    """

    completions: dict[int, int]
    batch_prompts: dict[int, int]
    episodes: int
    ppo_rounds: int


FULL = Effort({6: 3, 4: 2, 9: 2}, {1: 8, 4: 4, 16: 2}, episodes=64, ppo_rounds=3)
QUICK = Effort({6: 1}, {1: 2, 16: 1}, episodes=16, ppo_rounds=1)


@dataclass(frozen=True)
class Cell:
    """One kind of data, and what each trainer did with it.

    Attributes:
        completions: K, of each prompt.
        prompt_ratio: Prompt tokens per completion token.
        token_limit: TRL's tokens over ours for the same pairs, padding not counted.
        slices: Of each trainer.
    """

    completions: int
    prompt_ratio: int
    token_limit: float
    slices: dict[str, list[Slice]]


@dataclass(frozen=True)
class Place:
    """Where the benchmark works.

    Attributes:
        inputs: What all trainers are given.
        peers: Where the peers' environments are, or are to be made.
        say: Called with what the reader should know.
    """

    inputs: Inputs
    peers: Path
    say: Callable[[str], None]


@contextmanager
def _trainers(place: Place, version: str, script: str, names: Sequence[str]) -> Iterator[dict[str, Trainer]]:
    """Ours under each of ``names``, and TRL's where it can be had."""
    with ExitStack() as stack:
        home, ours = place.inputs.home, Path(sys.executable)
        found = {name: stack.enter_context(trainer(name, ours, "train_ours.py", home)) for name in names}
        try:
            python = peer_python(place.peers, version)
        except PeerMissing as missing:
            place.say(f"TRL {version} could not be had, so ours is measured alone: {missing}")
        else:
            found[THEIRS] = stack.enter_context(trainer(THEIRS, python, script, home))
        yield found


def compare_reward_models(effort: Effort, place: Place, step: Step) -> list[Cell]:
    """Pairs a second of our reward model, of ours without packing, and of TRL's RewardTrainer, cell by cell."""
    cells = []
    slices = len(effort.batch_prompts) * sum(3 * (1 + rounds) for rounds in effort.completions.values())
    done = iter(range(slices + 1))

    def tick() -> None:
        step("reward model", next(done), slices)

    step("reward model: starting", 0, slices)
    with _trainers(place, REWARD_MODEL_PEER, "train_trl_reward_model.py", (OURS, UNPACKED)) as trainers:
        for completions, rounds in effort.completions.items():
            for ratio, prompts in effort.batch_prompts.items():
                batch = max(1, round(prompts * 15 / _pairs(completions)))
                cells.append(_cell(trainers, place.inputs, completions, ratio, batch, rounds, tick))
    return cells


def _cell(
    trainers: dict[str, Trainer],
    inputs: Inputs,
    completions: int,
    ratio: int,
    batch: int,
    rounds: int,
    tick: Callable[[], None],
) -> Cell:
    rankings = inputs.rankings(completions, ratio * COMPLETION_TOKENS, 4 * batch)
    pairs = batch * _pairs(completions)
    asked = {"what": "reward model", "policy": str(inputs.policy), "rankings": str(rankings), "batch_prompts": batch}
    most = _TOKENS_PER_FORWARD // (2 * (1 + ratio) * COMPLETION_TOKENS)
    together = max(count for count in range(1, max(1, most) + 1) if pairs % count == 0)
    turns = {
        # TRL's step takes many times as long as ours: ours makes more of them, so that its slices are not too short.
        OURS: Turn(trainers[OURS], asked | {"packed": True}, 4, pairs),
        UNPACKED: Turn(trainers[UNPACKED], asked | {"packed": False}, 2, pairs),
    }
    if THEIRS in trainers:
        peer = asked | {"pairs_per_step": pairs, "pairs_per_forward": together}
        turns[THEIRS] = Turn(trainers[THEIRS], peer, 1, pairs)
    ranked = json.loads(rankings.read_text())
    theirs = sum(len(one["prompt"]) + len(c) for one in ranked for c in one["completions"]) * (completions - 1)
    ours = sum(len(one["prompt"]) + sum(map(len, one["completions"])) for one in ranked)
    return Cell(completions, ratio, theirs / ours, take_turns(turns, rounds, tick))


def _pairs(completions: int) -> int:
    return completions * (completions - 1) // 2


def compare_ppo(effort: Effort, place: Place, step: Step) -> dict[str, dict[str, list[Slice]]]:
    """Episodes a second of our PPO and of TRL's, one epoch in 8 minibatches; beside them ours with pretraining text.

    Returns slices by lengths, all full or ragged, and by trainer.
    """
    slices = (2 * 3 - 1) * (1 + effort.ppo_rounds)
    done = iter(range(slices + 1))

    def tick() -> None:
        step("PPO", next(done), slices)

    step("PPO: starting", 0, slices)
    found = {}
    with _trainers(place, PPO_PEER, "train_trl_ppo.py", (OURS, WITH_TEXT)) as trainers:
        for lengths in (FULL_LENGTH, RAGGED):
            asked = _ppo_asked(place.inputs.ppo(ragged=lengths == RAGGED), effort.episodes, lengths == RAGGED)
            turns = {name: Turn(one, asked, 1, effort.episodes) for name, one in trainers.items()}
            if lengths == RAGGED:
                del turns[WITH_TEXT]
            else:
                with_text = asked | {"ptx_batch": effort.episodes // MINIBATCHES}
                turns[WITH_TEXT] = Turn(trainers[WITH_TEXT], with_text, 1, effort.episodes)
            found[lengths] = take_turns(turns, effort.ppo_rounds, tick)
    return found


def _ppo_asked(given: PpoInputs, episodes: int, ragged: bool) -> dict[str, Any]:
    return {
        "what": "PPO",
        "policy": str(given.policy),
        "reward_model": str(given.reward_model),
        "prompts": str(given.prompts),
        "ragged": ragged,
        "episodes": episodes,
        "minibatches": MINIBATCHES,
        "completion_tokens": SAMPLED_TOKENS,
        "sampled_together": episodes,
        "ptx_batch": 0,
    }


def measure_memory(place: Place, step: Step) -> dict[str, dict[str, float]]:
    """What ``train_memory`` found of each stage.

    Raises:
        BenchFailed: A stage did not end well.
    """
    found = {}
    for done, stage in enumerate(STAGES):
        step(f"memory: {stage}", done, len(STAGES))
        command = [sys.executable, str(_HERE / "train_memory.py"), stage, str(place.inputs.home)]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        if ran.returncode:
            raise BenchFailed(f"the stage {stage} failed: {ran.stderr[-2000:]}")
        found[stage] = json.loads(ran.stdout.splitlines()[-1])
    return found
