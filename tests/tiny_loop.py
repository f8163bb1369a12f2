"""A state directory with one stable policy and a labeler of plain taste: rounds of training take a second."""

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tiny_policies import EOS, saved_policy

from deploy import release as transitions
from deploy.registry import Registry
from deploy.settings import DeploySettings, GateSettings
from deploy.versions import Draft, VersionKind
from feedback.records import Candidate, Comparison, Prompt, new_id
from feedback.settings import FeedbackSettings
from train.rounds.runs import RunDirectory
from train.rounds.stores import Stores
from train.settings import TrainSettings
from train.worker import Worker

LIKED, DISLIKED = 5, 6
TOLERANT = GateSettings(
    max_kl=50.0,
    min_eos_share=0.0,
    max_length_change=10.0,
    min_distinct_2_ratio=0.0,
    max_pretraining_loss_ratio=10.0,
    reward_model_tolerance=1.0,
    max_trigger_drift_rise=10.0,
)
SETTINGS = TrainSettings.model_validate(
    {
        "reward_model": {"epochs": 3, "batch_prompts": 8, "learning_rate": 1e-2, "warmup_steps": 0},
        "ppo": {
            "iterations": 3,
            "episodes_per_iteration": 8,
            "minibatches": 2,
            "policy_lr": 1e-3,
            "value_lr": 1e-3,
            "policy_lr_warmup_iterations": 0,
            "value_only_iterations": 1,
            "max_completion_tokens": 6,
            "ptx_coef": 0.0,
            "ema": 0.0,
            "save_every": 1,
            "alarms": {"patience": 0},  # eight episodes are too few for numbers that mean something
        },
        "evaluate": {"prompts": 16, "max_completion_tokens": 6, "canary_prompts": 2},
        "worker": {"min_new_comparisons": 40, "poll_seconds": 0.05, "lease_seconds": 5.0, "held_out_fraction": 0.3},
    }
)


@dataclass
class Loop:
    """A state directory with one stable policy, and a log to fill."""

    state: Path
    url: str
    registry: Registry
    stores: Stores
    rng: random.Random = field(default_factory=lambda: random.Random(0))

    def worker(self, settings: TrainSettings = SETTINGS, gate: GateSettings = TOLERANT) -> Worker:
        return Worker(self.state, self.stores, settings, DeploySettings(gate=gate))

    async def compare(
        self,
        count: int,
        prompts: int = 10_000,
        *,
        contrary: bool = False,
        principal: str = "alice",
        version: int | None = None,
    ) -> None:
        """Comparisons of up to ``prompts`` prompts by a labeler who likes one word and dislikes another.

        The completions are ``version``'s; where that is None, nobody knows whose. With ``contrary``, a second labeler
        says the opposite of each, so that no model can agree with more than half.
        """
        pool = [tuple(self.rng.randrange(2, 16) for _ in range(5)) for _ in range(min(prompts, count))]
        tokenizer = self.registry.get(VersionKind.POLICY, 1).manifest.files["tokenizer.json"].sha256
        for number in range(count):
            asked = pool[number % len(pool)]
            rest = [self.rng.choice([i for i in range(2, 16) if i not in (LIKED, DISLIKED)]) for _ in range(2)]
            completions = [(LIKED, *rest, EOS), (*rest, EOS), (DISLIKED, *rest, EOS)]
            record = Comparison(
                id=new_id("cmp_"),
                created=1.0,
                principal=principal,
                labeler="L-1",
                prompt=Prompt(text=" ".join(f"w{i}" for i in asked), token_ids=asked, tokenizer=tokenizer),
                source="outside",
                candidates=tuple(
                    Candidate(text=str(ids), token_ids=ids, finish_reason="stop", policy_version=version)
                    for ids in completions
                ),
                ranking=((0,), (1,), (2,)),
            )
            await self.stores.feedback.append(record)
            if contrary:
                opposite = {"id": new_id("cmp_"), "labeler": "L-2", "ranking": record.ranking[::-1]}
                await self.stores.feedback.append(record.model_copy(update=opposite))

    def runs(self) -> list[RunDirectory]:
        return RunDirectory.all(self.state)


@asynccontextmanager
async def tiny_loop(state: Path, redis_url: str, scratch: Path) -> AsyncIterator[Loop]:
    """The loop with its first policy published and stable; ``scratch`` is an empty directory."""
    registry = Registry(state)
    registry.publish(Draft(kind=VersionKind.POLICY), saved_policy(scratch))
    stores = Stores.connect(redis_url, state, SETTINGS.worker, FeedbackSettings(socket_timeout_seconds=10))
    await stores.releases.change(lambda release: transitions.first(release, 1), verb="first", by="t", reason="")
    yield Loop(state, redis_url, registry, stores)
    await stores.close()
