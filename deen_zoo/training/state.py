"""Training states in one file: tensors as safetensors, all else as JSON in its header.

A state is written under a temporary name and renamed, so a file of the final name is always whole,
whatever happens to the process or the disk.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..errors import UserError
from ..io import write_atomically

__all__ = ["load_state", "random_state", "save_state", "set_random_state"]

_TENSOR = "__tensor__"


def save_state(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Save nested dicts and lists of tensors, numbers, strings, bools and None.

    Dicts may have int keys, which come back as ints (an optimiser's state has them).
    """
    tensors: dict[str, torch.Tensor] = {}

    def pack(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            name = str(len(tensors))
            tensors[name] = value.detach().cpu().contiguous()
            return {_TENSOR: name}
        if isinstance(value, dict):
            return {
                "keys": list(value),
                "values": [pack(item) for item in value.values()],
            }
        return [pack(item) for item in value] if isinstance(value, list | tuple) else value

    structure = json.dumps(pack(state))
    write_atomically(path, save(tensors, metadata={"state": structure}))


def load_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What :func:`save_state` saved, on the CPU; tuples have become lists.

    Raises:
        UserError: There is no such file, or it is not one of these or is damaged.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: there is no such file; a run writes it when an epoch is done")
    try:
        with safe_open(str(path), framework="pt") as file:
            structure = json.loads((file.metadata() or {})["state"])

            def unpack(value: Any) -> Any:
                if isinstance(value, list):
                    return [unpack(item) for item in value]
                if not isinstance(value, dict):
                    return value
                if _TENSOR in value:
                    return file.get_tensor(value[_TENSOR])
                return dict(zip(value["keys"], map(unpack, value["values"]), strict=True))

            state: dict[str, Any] = unpack(structure)
            return state
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise UserError(
            f"{path} is not a training state of this package, or is damaged ({error}): "
            "remove it and train again, or restore it from a copy"
        ) from error


def random_state() -> dict[str, Any]:
    """The states of all global random generators: Python, NumPy, torch, every CUDA device."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": [kind, [int(key) for key in keys], *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Go on from a :func:`random_state`, before or after it went through a file."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
