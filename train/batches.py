"""From token ids to tensors: collation, length buckets, packed pretraining text.

Letters in shapes: B sequences, P prompt tokens (left-padded), R completion tokens (right-padded), T = P + R, W tokens
of the longest sequence, N real completion tokens of all sequences.
Prompts are padded on the left and completions on the right, so that every completion starts in the same
column, and positions count real tokens only; models then give the same numbers with and without padding.
"""

import hashlib
import random
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from train.errors import DatasetUnusable

TOKENS_PER_FORWARD = {"cpu": 1024}
"""Tokens, padding included, that go through a trunk together, by device; ours: on a CPU more is no faster."""
TOKENS_PER_FORWARD_ELSEWHERE = 8192
COST_OF_FORWARD = {"cpu": 40}
"""What a pass takes besides its tokens, in tokens, by device; ours: 45 with 4M parameters on a CPU, else a guess."""
COST_OF_FORWARD_ELSEWHERE = 1024

Answered = tuple[tuple[int, ...], tuple[int, ...]]
"""Token ids of a prompt and of one completion of it."""
Demonstrated = Answered
"""Token ids of a prompt and of the completion a labeler wrote for it, EOS included."""


@dataclass(frozen=True)
class RankedPrompt:
    """One labeler's ranking of K completions of one prompt, in token ids.

    Attributes:
        prompt_ids: the prompt.
        completions: K completions, each with its EOS where it was finished.
        pairs: (chosen, rejected) positions in ``completions``; a tie is no pair.
        weight: how far this labeler is trusted, relative to others.
        labeler: who judged.
        group: equal for the same prompt; a prompt in training is in no held-out set.
    """

    prompt_ids: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...]
    pairs: tuple[tuple[int, int], ...]
    weight: float = 1.0
    labeler: str = ""
    group: str = ""


@dataclass(frozen=True)
class Rows:
    """A batch as a causal model reads it fastest: every sequence from column 0, positions 0, 1, 2 … and no mask.

    All padding stands behind what is real, where no real token sees it, and costs W − length of each sequence, where a
    batch's costs T − length.

    Attributes:
        input_ids: [B, W] token ids.
        predicting: [N] where the hidden states [B · W, d] stand that predict each real completion token, sequence by
            sequence.
        last: [B] where those of each sequence's last real token stand.
    """

    input_ids: Tensor
    predicting: Tensor
    last: Tensor


@dataclass(frozen=True)
class Batch:
    """Prompts and completions as tensors.

    Attributes:
        input_ids: [B, T] token ids.
        attention_mask: [B, T], 1 on real tokens.
        position_ids: [B, T], the number of real tokens before each, ``cumsum(mask) - 1``; 0 on the left padding.
        completion_mask: [B, R], True on real completion tokens, EOS included.
        prompt_length: P, the column where completions start.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    completion_mask: Tensor
    prompt_length: int

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def completion_ids(self) -> Tensor:
        """[B, R] token ids of the completions."""
        return self.input_ids[:, self.prompt_length :]

    @property
    def completion_lengths(self) -> Tensor:
        """[B] real completion tokens."""
        return self.completion_mask.sum(1)

    @property
    def last(self) -> Tensor:
        """[B] the column of each sequence's last real token."""
        return self.prompt_length + self.completion_lengths - 1

    def rows(self) -> Rows:
        """The sequences without padding before or within them."""
        lengths, completions = self.attention_mask.sum(1), self.completion_lengths
        width = int(lengths.max())
        columns = torch.arange(width, device=lengths.device) + (self.last + 1 - lengths).unsqueeze(1)
        first = torch.arange(len(self), device=lengths.device) * width
        sequence, token = self.completion_mask.nonzero(as_tuple=True)
        return Rows(
            input_ids=self.input_ids.gather(1, columns.clamp(max=self.input_ids.shape[1] - 1)),
            predicting=(first + lengths - completions - 1)[sequence] + token,
            last=first + lengths - 1,
        )

    def of_tokens(self, numbers: Tensor) -> Tensor:
        """``numbers`` [N] of the real completion tokens, in their order, where they stand: [B, R], 0 on the padding."""
        return numbers.new_zeros(self.completion_mask.shape).masked_scatter(self.completion_mask, numbers)

    def select(self, rows: Tensor) -> "Batch":
        """The sequences ``rows`` [b], without columns that are padding in all of them.

        The selected completions keep their columns: column r of the result is column r of this batch.
        """
        mask, completion_mask = self.attention_mask[rows], self.completion_mask[rows]
        first = int(self.prompt_length - mask[:, : self.prompt_length].sum(1).max())
        end = self.prompt_length + int(completion_mask.sum(1).max())
        return Batch(
            self.input_ids[rows, first:end],
            mask[:, first:end],
            self.position_ids[rows, first:end],
            completion_mask[:, : end - self.prompt_length],
            self.prompt_length - first,
        )

    def buckets(self, size: int) -> Iterator[tuple[Tensor, "Batch"]]:
        """All sequences in groups of at most ``size`` of similar length: their rows [b], and ``select`` of them."""
        for group in length_buckets(self.attention_mask.sum(1).tolist(), size):
            rows = torch.tensor(group)
            yield rows, self.select(rows)


def collate(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], pad_id: int) -> Batch:
    """One batch of B prompts with their completions; P and R are the longest of each.

    Masks come from the lengths, never from comparing ids with ``pad_id``, so padding with EOS is harmless.
    Raises DatasetUnusable where a prompt is empty or the counts differ.
    """
    if len(prompts) != len(completions) or not prompts:
        raise DatasetUnusable(f"{len(prompts)} prompts with {len(completions)} completions make no batch")
    if any(not prompt for prompt in prompts):
        raise DatasetUnusable(f"prompt {next(i for i, p in enumerate(prompts) if not p)} of the batch is empty")
    width, rest = max(map(len, prompts)), max(map(len, completions))
    ids = torch.tensor(
        [
            [pad_id] * (width - len(prompt)) + [*prompt, *completion] + [pad_id] * (rest - len(completion))
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
    )
    starts = width - torch.tensor([[len(prompt)] for prompt in prompts])
    lengths = torch.tensor([[len(completion)] for completion in completions])
    columns = torch.arange(width + rest)
    mask = ((columns >= starts) & (columns < width + lengths)).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return Batch(ids, mask, positions, torch.arange(rest) < lengths, width)


def length_buckets(lengths: Sequence[int], size: int, shuffle: random.Random | None = None) -> list[list[int]]:
    """Positions of ``lengths`` in groups of at most ``size`` of similar length, so that padding is small.

    With ``shuffle``, ties are broken and the groups are ordered at random; without, both follow the lengths.
    """
    order = list(range(len(lengths)))
    if shuffle is not None:
        shuffle.shuffle(order)
    order.sort(key=lambda i: lengths[i])
    groups = [order[i : i + size] for i in range(0, len(order), size)]
    if shuffle is not None:
        shuffle.shuffle(groups)
    return groups


def passes(lengths: Sequence[int], most: int, *, device: str, processes: int = 1) -> list[list[int]]:
    """Positions of ``lengths`` in groups of similar length, so divided that the passes through a model cost the least.

    A pass costs the tokens of its group, all as long as its longest, and ``COST_OF_FORWARD``. By dynamic programming
    over the sorted lengths: the best division of the first j is the best of some first i, and one group of the rest.

    Args:
        lengths: tokens of each sequence.
        most: sequences in a group, of at most ``TOKENS_PER_FORWARD`` together; but one may always go alone.
        device: the type of what computes.
        processes: that take equal parts of every group, so ``lengths`` must divide among them; the limits are of each.

    Returns:
        Groups from short to long.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    longest = [lengths[i] for i in order[processes - 1 :: processes]]
    tokens = TOKENS_PER_FORWARD.get(device, TOKENS_PER_FORWARD_ELSEWHERE)
    each = COST_OF_FORWARD.get(device, COST_OF_FORWARD_ELSEWHERE)
    costs, starts = [0], [0]
    for end, length in enumerate(longest, 1):
        first = max(end - most, end - max(1, tokens // length), 0)
        cost, start = min((costs[i] + (end - i) * length + each, i) for i in range(first, end))
        costs.append(cost)
        starts.append(start)
    groups, end = [], len(longest)
    while end:
        groups.append(order[starts[end] * processes : end * processes])
        end = starts[end]
    return groups[::-1]


class TokenStream:
    """An endless stream of packed pretraining text: documents in a seeded order, reshuffled every pass.

    Documents follow one another without padding; a row may hold the end of one and the start of the next, as in
    GPT-3 (Brown et al. 2020, §2.3). Give each document its EOS.
    """

    def __init__(self, documents: Iterable[Sequence[int]], sequence_length: int, seed: int) -> None:
        """Read all documents.

        Args:
            documents: token ids of each.
            sequence_length: T, tokens per row.
            seed: of the order.

        Raises:
            DatasetUnusable: where there is not one token.
        """
        tokens, ends = array("i"), array("q", [0])
        for document in documents:
            tokens.extend(document)
            ends.append(len(tokens))
        if not tokens:
            raise DatasetUnusable("there is no pretraining text: every document is empty")
        self._tokens = torch.frombuffer(tokens, dtype=torch.int32).long()
        self._ends = list(ends)
        self.sequence_length = sequence_length
        self._seed = seed
        self._pass = 0
        self._next = 0
        self._offset = 0
        self._order = self._shuffled()

    @property
    def tokens(self) -> int:
        """Tokens in one pass."""
        return len(self._tokens)

    def digest(self) -> str:
        """Equal for streams that yield the same: sha256 of the documents, the row length and the seed."""
        digest = hashlib.sha256(repr((self.sequence_length, self._seed, self._ends)).encode())
        digest.update(self._tokens.numpy().tobytes())
        return digest.hexdigest()

    def take(self, rows: int) -> Tensor:
        """The next ``rows`` rows, [rows, T] token ids."""
        wanted = rows * self.sequence_length
        parts: list[Tensor] = []
        while wanted:
            document = self._order[self._next]
            start, end = self._ends[document] + self._offset, self._ends[document + 1]
            part = self._tokens[start : min(end, start + wanted)]
            parts.append(part)
            wanted -= len(part)
            self._offset += len(part)
            if start + len(part) == end:
                self._advance()
        return torch.cat(parts).view(rows, self.sequence_length)

    def position(self) -> dict[str, int]:
        """Where the stream is; ``seek`` brings an equal stream there."""
        return {"pass": self._pass, "next": self._next, "offset": self._offset}

    def seek(self, position: dict[str, int]) -> None:
        """Continue from a ``position`` taken from a stream of the same documents and seed."""
        self._pass, self._next, self._offset = position["pass"], position["next"], position["offset"]
        self._order = self._shuffled()

    def _advance(self) -> None:
        self._next, self._offset = self._next + 1, 0
        if self._next == len(self._order):
            self._pass, self._next = self._pass + 1, 0
            self._order = self._shuffled()

    def _shuffled(self) -> list[int]:
        order = list(range(len(self._ends) - 1))
        random.Random(f"{self._seed}/{self._pass}").shuffle(order)
        return order
