"""What is taken for personal data; the card and account numbers are published test numbers."""

import time

import pytest

from train.rounds.personal_data import holds_personal_data


@pytest.mark.parametrize(
    "text",
    [
        "write to ann.lee+news@mail.example.org, please",
        "call +44 20 7946 0958",
        "call +1 (415) 555-0132 today",
        "(415) 555-0132",
        "her number is 415-555-0132.",
        "my card is 4111 1111 1111 1111",
        "4242424242424242",
        "transfer it to DE89 3704 0044 0532 0130 00",
        "GB82WEST12345698765432",
        "SSN 078-05-1120",
    ],
)
def test_personal_data_is_found(text: str) -> None:
    assert holds_personal_data(text)


@pytest.mark.parametrize(
    "text",
    [
        "what is 4111 1111 1111 1112 divided by 3?",
        "0000 0000 0000 0000",
        "DE89 3704 0044 0532 0130 03",
        "multiply 1234567890123456",
        "on 2026-11-22 at 20:15, version 1.22.333.4444",
        "from 1000-2000 to 3000",
        "user @home says a+b = c",
        "000-12-3456 is no such number",
        "tell me about a frog",
        "",
    ],
)
def test_numbers_that_are_nobody_s_are_left(text: str) -> None:
    assert not holds_personal_data(text)


@pytest.mark.parametrize("unit", ["a.", "1 ", "+1 ", "A1", "a@", "a@b.", "(1) "])
def test_no_prompt_takes_long(unit: str) -> None:
    started = time.process_time()
    holds_personal_data(unit * (200_000 // len(unit)))
    assert time.process_time() - started < 2.0
