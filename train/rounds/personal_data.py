"""Personal data in prompts: what is to be left out of training (InstructGPT §3.2 filters prompts that hold any).

A filter of plain patterns: e-mail addresses, telephone numbers as people write them, payment card numbers (ISO/IEC
7812: the last digit is Luhn's), IBANs (ISO 7064, mod 97) and US social security numbers. It does not know names or
addresses. What it takes by mistake costs one prompt. Every pattern is bounded, so that no prompt takes long.
"""

import re

_EMAIL = re.compile(r"[\w.+-]{1,64}@(?:[\w-]{1,63}\.){1,8}[A-Za-z]{2,63}\b")  # bounds of RFC 5321, §4.5.3.1
_TELEPHONE = re.compile(
    r"(?<![\w.])"
    r"(\+\d{1,3}[ .-]?(\(\d{1,4}\)|\d)([ .-]?\d){6,12}"  # +44 20 7946 0958
    r"|\(\d{3}\) ?\d{3}[ .-]\d{4}|\d{3}([.-])\d{3}\4\d{4})"  # (415) 555-0132, 415-555-0132
    r"(?![\w-])"
)
_SOCIAL_SECURITY = re.compile(r"(?<![\w-])(?!000|666|9\d\d)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\w-])")
_CARD = re.compile(r"(?<![\w.-])\d(?:[ -]?\d){12,18}(?![\w-])")
_IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]){11,30}\b")


def holds_personal_data(text: str) -> bool:
    """Whether ``text`` has something in it that one of the patterns takes for personal data."""
    if _EMAIL.search(text) or _TELEPHONE.search(text) or _SOCIAL_SECURITY.search(text):
        return True
    return any(map(_is_card, _CARD.findall(text))) or any(map(_is_iban, _IBAN.findall(text)))


def _is_card(written: str) -> bool:
    """Luhn: every second digit from the right doubled, digits of the products added up, a multiple of 10."""
    digits = [int(digit) for digit in written if digit.isdigit()]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return len(set(digits)) > 1 and (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def _is_iban(written: str) -> bool:
    """The first four characters moved to the end, letters as 10 … 35, leave 1 when divided by 97."""
    plain = written.replace(" ", "")
    return int("".join(str(int(char, 36)) for char in plain[4:] + plain[:4])) % 97 == 1
