import pytest

from serve.auth import NotLoopback, require_loopback


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.10", "::1", "localhost"])
def test_loopback_is_open(host: str) -> None:
    require_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "192.168.1.5", "example.org", ""])
def test_without_keys_nothing_else_is(host: str) -> None:
    with pytest.raises(NotLoopback):
        require_loopback(host)
