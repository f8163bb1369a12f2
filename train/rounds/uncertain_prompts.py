"""Which stored prompts a reward model is unsure about (``train.measures.informativeness``): labelers see them first."""

import contextlib
from collections.abc import Mapping, Sequence

from deploy.versions import Version
from feedback.records import Prompt
from train.encoding import Unencodable, encoder_of
from train.measures import informativeness
from train.settings import TrainSettings


def informative(
    asked: Mapping[str, Sequence[Prompt]],
    policy: Version,
    reward_model: Version,
    settings: TrainSettings,
    seed: int,
) -> dict[str, float]:
    """How informative comparisons of ``policy``'s completions would be, in nats, by whatever names the prompts.

    A name's figure is that of its most informative prompt; one without a prompt that can be completed is left out.

    Raises:
        ModelUnusable: The versions' files cannot be loaded.
    """
    encoder = encoder_of(policy, settings)
    ids_of: dict[str, list[tuple[int, ...]]] = {name: [] for name in asked}
    for name, prompts in asked.items():
        for prompt in prompts:
            with contextlib.suppress(Unencodable):
                ids_of[name].append(encoder.prompt(prompt))
    distinct = list(dict.fromkeys(ids for each in ids_of.values() for ids in each if ids and encoder.leaves_room(ids)))
    nats = dict(
        zip(
            distinct,
            informativeness.run(settings.evaluate, policy.path, reward_model.path, distinct, seed=seed),
            strict=True,
        )
    )
    found = {name: [nats[ids] for ids in each if ids in nats] for name, each in ids_of.items()}
    return {name: max(each) for name, each in found.items() if each}
