"""From records to token ids of one policy's tokenizer."""

from collections.abc import Sequence
from pathlib import Path

from jinja2 import TemplateError
from transformers import AutoConfig, PreTrainedTokenizerBase

from deploy.versions import Version
from feedback.records import Candidate, Prompt
from train.errors import ModelUnusable
from train.models import load_tokenizer
from train.settings import TrainSettings


class Unencodable(Exception):
    """A record whose text cannot be turned into this tokenizer's ids; it is left out and counted."""


class Encoder:
    """Turns records into token ids of one tokenizer.

    Ids that the serving tokenizer recorded are taken as they are: they are what the policy sampled. Text is
    tokenized where there are none, or where another tokenizer made them.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, digest: str, window: int, max_completion_tokens: int
    ) -> None:
        """Encode for one policy.

        Args:
            tokenizer: the policy's.
            digest: sha256 of its tokenizer.json.
            window: tokens the policy reads at most.
            max_completion_tokens: room a prompt must leave where completions are sampled for it.
        """
        self._tokenizer = tokenizer
        self._digest = digest
        self._window = window
        self._longest_prompt = window - max_completion_tokens
        self._eos = int(tokenizer.eos_token_id)

    def prompt(self, prompt: Prompt) -> tuple[int, ...]:
        """Ids of a prompt, up to where the completion starts. Raises Unencodable."""
        if prompt.token_ids and prompt.tokenizer == self._digest:
            return prompt.token_ids
        if prompt.messages is not None:
            return self._ids(self._rendered(prompt))
        if prompt.text:
            return tuple(self._tokenizer.encode(prompt.text))
        raise Unencodable("the prompt is token ids of another tokenizer, without its text")

    def candidate(self, prompt: Prompt, candidate: Candidate) -> tuple[int, ...]:
        """Ids of a sampled completion, with its EOS unless it was cut off at the length limit. Raises Unencodable."""
        if candidate.token_ids and prompt.tokenizer == self._digest:
            ids = candidate.token_ids
            cut_off = candidate.finish_reason == "length"
            return ids if cut_off or ids[-1] == self._eos else (*ids, self._eos)
        return self.written(prompt, candidate.text)

    def written(self, prompt: Prompt, text: str) -> tuple[int, ...]:
        """Ids of a finished completion given as text; after messages, as the chat template writes it.

        Raises Unencodable.
        """
        if prompt.messages is not None:
            before, after = self._rendered(prompt), self._rendered(prompt, answer=text)
            if after.startswith(before):
                ids = self._ids(after.removeprefix(before))
                return ids[: ids.index(self._eos) + 1] if self._eos in ids else (*ids, self._eos)
        return (*self._ids(text), self._eos)

    def text(self, prompt_ids: Sequence[int]) -> str:
        """What a prompt's token ids say, for those that are stored without their text."""
        return str(self._tokenizer.decode(list(prompt_ids)))

    def check_fits(self, prompt_ids: Sequence[int], *completions: Sequence[int]) -> None:
        """Raise Unencodable where a prompt with its longest completion is longer than the model's window."""
        if len(prompt_ids) + max(map(len, completions), default=0) > self._window:
            raise Unencodable(f"longer than {self._window} tokens")

    def leaves_room(self, prompt_ids: Sequence[int]) -> bool:
        """Whether a completion of the greatest length can be sampled for a prompt."""
        return len(prompt_ids) <= self._longest_prompt

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))

    def _rendered(self, prompt: Prompt, answer: str | None = None) -> str:
        messages = list(prompt.messages or ())
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer is None)
        except (TemplateError, ValueError, TypeError, KeyError) as error:
            raise Unencodable(f"the chat template refuses the messages: {error}") from error
        return str(text)


def encoder_of(policy: Version, settings: TrainSettings) -> Encoder:
    """The encoder for training ``policy``. Raises ModelUnusable where its tokenizer or config cannot be loaded."""
    return Encoder(
        load_tokenizer(policy.path),
        policy.tokenizer_digest or "",
        _window(policy.path),
        max(settings.ppo.max_completion_tokens, settings.evaluate.max_completion_tokens),
    )


def _window(directory: Path) -> int:
    """Tokens that the model in ``directory`` reads at most; its weights are not loaded for that."""
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelUnusable(f"{directory} holds no usable config.json: {error}") from error
    return int(config.max_position_embeddings)
