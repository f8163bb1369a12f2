"""A tokenizer of one token a byte, with a chat template, and an encoder that uses it."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from train.encoding import Encoder

EOS = 1


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """One token a byte, and a chat template that ends an answer with EOS and a newline, as ChatML does."""
    vocabulary = {"<pad>": 0, "<eos>": EOS}
    vocabulary |= {char: 2 + place for place, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bytewise = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    template = (
        "{% for message in messages %}"
        "{% if message.role == 'assistant' %}{{ '> ' + message.content + eos_token + '\n' }}"
        "{% elif message.role == 'user' %}{{ '# ' + message.content + '\n' }}"
        "{% else %}{{ raise_exception('no ' + message.role) }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '>' }}{% endif %}"
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bytewise, pad_token="<pad>", eos_token="<eos>", chat_template=template
    )


TOKENIZER = byte_tokenizer()
ENCODER = Encoder(TOKENIZER, "same", window=40, max_completion_tokens=10)


def ids(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER.encode(text))
