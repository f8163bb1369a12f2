import random
from collections import Counter, defaultdict

from deploy.task_kinds import GROUPS, task_kinds
from feedback.records import Candidate, Comparison, Prompt

NOUNS = ["frog", "cat", "king", "queen", "ship", "tree", "dog", "bird"]
KINDS = [
    "tell me about a {}",
    "what is the color of the {} ?",
    "write a list of {} {} things",
    "say hello to the {}",
    "copy the words {} {} twice",
    "insult the {} please",
    "how many {} are in the {}",
]


def asked(prompt: Prompt, **metadata: str) -> Comparison:
    return Comparison(
        id="cmp_1",
        created=1.0,
        principal="alice",
        labeler="L-1",
        prompt=prompt,
        metadata=metadata,
        source="task",
        candidates=(Candidate(text="a"), Candidate(text="b")),
        ranking=((0,), (1,)),
    )


def test_a_named_task_is_its_kind() -> None:
    named = asked(Prompt(text="hello"), task="greeting", other="x")
    assert task_kinds([named, asked(Prompt(text="hello"))]) == ["greeting", "group 1"]
    assert task_kinds([]) == []


def test_prompts_without_a_task_are_grouped_by_their_words() -> None:
    draw = random.Random(3)
    truth = [draw.randrange(len(KINDS)) for _ in range(600)]
    prompts = [KINDS[kind].format(draw.choice(NOUNS), draw.choice(NOUNS)) for kind in truth]
    found = task_kinds([asked(Prompt(text=text)) for text in prompts])
    of_group: defaultdict[str, Counter[int]] = defaultdict(Counter)
    for group, kind in zip(found, truth, strict=True):
        of_group[group][kind] += 1
    assert len(of_group) == GROUPS
    assert sum(counts.most_common(1)[0][1] for counts in of_group.values()) / 600 > 0.9
    sizes = [sum(of_group[f"group {place}"].values()) for place in range(1, GROUPS + 1)]
    assert sizes == sorted(sizes, reverse=True)


def test_the_order_in_which_prompts_came_changes_no_group() -> None:
    prompts = [asked(Prompt(text=KINDS[place % 7].format(NOUNS[place % 8], NOUNS[place % 5]))) for place in range(80)]
    forth, back = task_kinds(prompts), task_kinds(prompts[::-1])[::-1]
    assert len(set(zip(forth, back, strict=True))) == len(set(forth)), "the same groups, whatever their numbers"


def test_messages_and_prompts_without_words_have_a_kind() -> None:
    chat = asked(Prompt(messages=({"role": "user", "content": "tell me a joke"},)))
    parts = asked(Prompt(messages=({"role": "user", "content": [{"type": "text", "text": "x"}]},)))
    ids = asked(Prompt(token_ids=(1, 2)))
    assert all(kind.startswith("group ") for kind in task_kinds([chat, parts, ids, asked(Prompt(text="?!"))]))
