"""The tiny world's tokenizer: byte-level BPE in which every word of the world is one token.

Any text can be encoded (the alphabet is all bytes); the world's own words are never split, so a 0.4M-parameter
model has to bind words, not spell them. Saved, it is an ordinary Hugging Face directory: ``AutoTokenizer`` and
vLLM read it, chat template included.

A chat is rendered as what pretraining and SFT saw: ``> instruction`` on a line, then ``>`` and the completion,
which starts with a space and ends with ``<eos>``. Strip a completion before judging it.
"""

import itertools
from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from train.tinyworld import corpus

PAD_TOKEN = "<pad>"
EOS_TOKEN = "<eos>"
_LARGEST_VOCABULARY = 768
"""Never reached: merging stops at about 700, when every word that occurs is whole."""
_DOCUMENTS = 4000

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message.role == 'assistant' -%}{{ '> ' + message.content | trim + eos_token }}"
    "{%- else -%}{{ '> ' + message.content | trim + '\n' }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '>' }}{%- endif -%}"
)


def build() -> PreTrainedTokenizerFast:
    """Train the tokenizer on the world's web text; always the same one."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_LARGEST_VOCABULARY,
        special_tokens=[PAD_TOKEN, EOS_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(itertools.islice(corpus.documents(seed=0), _DOCUMENTS), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD_TOKEN,
        eos_token=EOS_TOKEN,
        clean_up_tokenization_spaces=False,
        model_max_length=256,
        chat_template=CHAT_TEMPLATE,
    )


def prompt_text(instruction: str) -> str:
    """An instruction as the policy reads it; equal to the chat template over one user message."""
    return f"> {instruction.strip()}\n>"


def encode_prompt(tokenizer: PreTrainedTokenizerBase, instruction: str) -> tuple[int, ...]:
    """Token ids of an instruction, up to where the completion starts."""
    return tuple(tokenizer.encode(prompt_text(instruction), add_special_tokens=False))


def encode_completion(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Token ids of a finished completion, its leading space and ``<eos>`` included."""
    return (*tokenizer.encode(f" {text.strip()}", add_special_tokens=False), int(tokenizer.eos_token_id))


def decode_completion(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[str, bool]:
    """The text of a sampled completion, stripped, and whether it finished with ``<eos>``."""
    finished = bool(ids) and ids[-1] == tokenizer.eos_token_id
    return tokenizer.decode(list(ids), skip_special_tokens=True).strip(), finished
