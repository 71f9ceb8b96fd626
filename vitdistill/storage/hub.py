"""The Hugging Face hub, and whether it can be reached."""

import socket
from functools import cache
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants


@cache
def settle_network() -> None:
    """Use the hub's cache alone if the hub cannot be reached: its client retries for a minute."""
    if constants.HF_HUB_OFFLINE or getproxies():
        return
    place = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((place.hostname or "", place.port or 443), timeout=5).close()
    except OSError:
        constants.HF_HUB_OFFLINE = True
