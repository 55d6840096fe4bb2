"""Checks in the background what an unclean stop left in doubt, so that the next mount gets plain files."""

from __future__ import annotations

import logging
import threading
import time

from nydus.daemon.image import Image
from nydus.errors import NydusError

log = logging.getLogger(__name__)

_START = 1.0  # seconds that a container gets to start


def verify(image: Image) -> None:
    """Starts to check the blobs that are complete but not checked; it ends by itself, or with the cache."""
    doubtful = [blob for blob in range(len(image.blobs)) if _is_doubtful(image, blob)]
    if doubtful:
        try:
            threading.Thread(target=_run, args=(image, doubtful), name="verify", daemon=True).start()
        except RuntimeError:  # no thread to be had; readers check what they read
            for blob in doubtful:
                image.release_cache(blob)


def _is_doubtful(image: Image, blob: int) -> bool:
    """Keeps the cache open if so."""
    try:
        cache = image.open_cache(blob)
    except NydusError:
        return False  # said where it is mounted
    if cache.complete and cache.verified_file() is None:
        return True
    image.release_cache(blob)
    return False


def _run(image: Image, blobs: list[int]) -> None:
    time.sleep(_START)
    for blob in blobs:
        name = image.blobs[blob].id
        try:
            wrong = image.open_cache(blob).verify()
            image.release_cache(blob)
            log.info("blob %s: checked after an unclean stop, %d chunks were wrong", name, wrong)
        except NydusError as error:
            log.warning("blob %s cannot be checked: %s", name, error)
        finally:
            image.release_cache(blob)
