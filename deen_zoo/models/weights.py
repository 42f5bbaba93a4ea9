"""Where pretrained weights come from, and what to say when there are none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError

HUB_ORGANISATION = os.environ.get("DEEN_ZOO_HUB_ORG", "deen-zoo")
TINY_WEIGHTS = str(Path(__file__).with_name("test_deen_resnet.safetensors"))


@contextmanager
def explain_missing_weights(variant: str) -> Iterator[None]:
    """Say in one line why ``variant`` could not be had from the Hub, and what to do.

    Raises:
        UserError: The Hub client found no repository, no file, no access or no network.
    """
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        if not isinstance(error, (HfHubHTTPError, LocalEntryNotFoundError)):
            raise
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"no weights for {variant}: {reason} No SYSU, RegDB or LLCM weights have been "
            f"published yet: train with 'deen-zoo reproduce', convert an official file with "
            f"'deen-zoo convert', or name another repository (DEEN_ZOO_HUB_ORG, or "
            f"timm.create_model('hf-hub:ORG/NAME'))"
        ) from error
