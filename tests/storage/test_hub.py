"""A hub that cannot be reached is not asked again and again."""

import socket
import time
from collections.abc import Callable, Iterator

import pytest
from huggingface_hub import constants, hf_hub_download

from vitdistill.storage import hub


class Connection:
    def close(self) -> None: ...


@pytest.fixture(autouse=True)
def _online(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "getproxies", dict)
    hub.settle_network.cache_clear()
    yield
    hub.settle_network.cache_clear()


def reached(answer: Callable[..., object], monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(socket, "create_connection", answer)
    hub.settle_network()
    return not constants.HF_HUB_OFFLINE


def refuse(error: OSError) -> Callable[..., object]:
    def answer(*_: object, **__: object) -> object:
        raise error

    return answer


@pytest.mark.parametrize(
    "error",
    [
        socket.gaierror(-2, "Name or service not known"),
        ConnectionRefusedError(111, "refused"),
        OSError(101, "Network is unreachable"),
        TimeoutError("timed out"),
    ],
)
def test_without_network_only_the_cache_is_read(
    error: OSError, monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    assert not reached(refuse(error), monkeypatch)
    begun = time.monotonic()
    with pytest.raises(Exception, match="cach"):
        hf_hub_download(
            "timm/deit_tiny_patch16_224.fb_in1k", "config.json", cache_dir=str(tmp_path)
        )
    assert time.monotonic() - begun < 5


def test_with_network_or_behind_a_proxy_the_hub_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert reached(lambda *_, **__: Connection(), monkeypatch)
    hub.settle_network.cache_clear()
    monkeypatch.setattr(hub, "getproxies", lambda: {"https": "http://proxy:3128"})
    assert reached(refuse(OSError()), monkeypatch)
