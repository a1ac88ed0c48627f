"""`is_reachable`: can the model hub be asked? Without a network its client tries for a minute before it says no."""

import os
import threading
import urllib.error
import urllib.request

_ENDPOINT = "https://huggingface.co"
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_SECONDS = 4.0
ADVICE = "write ./NAME for a folder here, or let `m3 init` find models that are installed"
"""What a user can do who has no hub."""


def is_reachable() -> bool:
    """Ask the hub (``HF_ENDPOINT``, through a proxy where one is set) for a sign of life, for a few seconds at most.

    ``HF_HUB_OFFLINE`` and ``TRANSFORMERS_OFFLINE`` answer without asking.
    """
    if any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in _OFFLINE):
        return False
    found: list[bool] = []
    # Looking up a name has no time limit of its own.
    asking = threading.Thread(target=lambda: found.append(_answers()), daemon=True)
    asking.start()
    asking.join(_SECONDS)
    return bool(found and found[0])


def _answers() -> bool:
    try:
        request = urllib.request.Request(os.environ.get("HF_ENDPOINT") or _ENDPOINT, method="HEAD")
        with urllib.request.urlopen(request, timeout=_SECONDS):
            return True
    except urllib.error.HTTPError:
        return True  # it refuses, and so it is there
    except (OSError, ValueError):
        return False
