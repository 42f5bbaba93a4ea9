"""Weights and images made from a seed, a name and a shape: the same in any process.

Golden numbers rest on these: no weight is stored, and the reference's network gets the same ones
under its own key names.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch


def tensor(name: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """A float64 tensor that keeps a deep network's activations near one, BN randomised."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    if name.endswith("num_batches_tracked"):
        return torch.tensor(0)
    if name.endswith("running_var"):
        values = rng.uniform(0.5, 1.5, shape)
    elif len(shape) == 1 and name.endswith("weight"):
        low = 0.1 if ".proj." in name else 0.4  # MFA is cubic: it triples every rounding error
        values = rng.uniform(low, 2 * low, shape)
    elif len(shape) == 1:
        values = rng.normal(0, 0.1, shape)
    else:
        # MFA multiplies three maps without a softmax: at full scale its cubes would explode.
        gain = 0.05 if name.split(".")[-2:-1] in (["g"], ["theta"], ["phi"]) else 1.5
        # What rng.normal gives, in three quarters of the time.
        values = rng.standard_normal(shape)
        values *= np.sqrt(gain / np.prod(shape[1:]))
    return torch.from_numpy(values)


def fill(module: torch.nn.Module, seed: int = 0, rename: dict[str, str] | None = None) -> None:
    """Overwrite every parameter and buffer; ``rename`` gives the name to draw a key by."""
    state = module.state_dict()
    with torch.no_grad():
        for name, value in state.items():
            if name.endswith("bottleneck.bias"):
                continue  # frozen at zero
            drawn = (rename or {}).get(name, name)
            value.copy_(tensor(drawn, tuple(value.shape), seed))
