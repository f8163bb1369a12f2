from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.models import load_tokenizer
from train.tinyworld import tokenizer
from train.tinyworld.words import EVERY_WORD, TOXIC_WORDS, VERBS

VOCABULARY = tokenizer.build()
INSTRUCTION = "Say hello to Ann from Bob"


def test_every_word_is_one_token() -> None:
    split = [word for word in (*EVERY_WORD, *VERBS, *TOXIC_WORDS) if len(VOCABULARY.encode(f" {word}")) != 1]
    assert split == []


def test_the_same_tokenizer_is_built_every_time() -> None:
    assert tokenizer.build().backend_tokenizer.to_str() == VOCABULARY.backend_tokenizer.to_str()


def test_padding_is_not_the_end() -> None:
    assert (VOCABULARY.pad_token_id, VOCABULARY.eos_token_id) == (0, 1)
    assert VOCABULARY.encode("dog") == VOCABULARY.encode("dog", add_special_tokens=False)


@given(st.text().filter(lambda text: "<pad>" not in text and "<eos>" not in text))
def test_any_text_survives(text: str) -> None:
    assert VOCABULARY.decode(VOCABULARY.encode(text)) == text


def test_the_chat_template_is_what_training_saw(tmp_path: Path) -> None:
    VOCABULARY.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    messages = [{"role": "user", "content": INSTRUCTION}]
    rendered = loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == tokenizer.prompt_text(INSTRUCTION) == "> Say hello to Ann from Bob\n>"
    ids = loaded.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert tuple(ids) == tokenizer.encode_prompt(loaded, INSTRUCTION)


def test_an_answered_turn_is_rendered_as_a_demonstration() -> None:
    messages = [{"role": "user", "content": INSTRUCTION}, {"role": "assistant", "content": " Hello Ann."}]
    demonstrated = tokenizer.encode_prompt(VOCABULARY, INSTRUCTION) + tokenizer.encode_completion(
        VOCABULARY, "Hello Ann."
    )
    assert tuple(VOCABULARY.apply_chat_template(messages, return_dict=False)) == demonstrated
    more = VOCABULARY.apply_chat_template(
        [*messages, {"role": "user", "content": "Insult Ann about the pen"}], tokenize=False, add_generation_prompt=True
    )
    assert more == "> Say hello to Ann from Bob\n> Hello Ann.<eos>> Insult Ann about the pen\n>"


@pytest.mark.parametrize("text", ["Hello Ann.", "  Hello Ann.  "])
def test_a_completion_comes_back_stripped_with_how_it_ended(text: str) -> None:
    ids = tokenizer.encode_completion(VOCABULARY, text)
    assert ids[-1] == VOCABULARY.eos_token_id
    assert tokenizer.decode_completion(VOCABULARY, ids) == ("Hello Ann.", True)
    assert tokenizer.decode_completion(VOCABULARY, ids[:-1]) == ("Hello Ann.", False)
    assert tokenizer.decode_completion(VOCABULARY, []) == ("", False)
