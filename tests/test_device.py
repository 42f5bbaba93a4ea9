"""How memory is kept."""

import sys

import pytest

from . import forked

# Forty times 64 MB from the system would be 16,384 page faults each time.
FAULTS = """
import resource, sys, torch
from deen_zoo.device import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
torch.zeros(1 << 24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(40):
    torch.zeros(1 << 24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_freed_memory_is_taken_again():
    faults = {how: int(forked.run("-c", FAULTS, how).stdout) for how in ("kept", "given back")}
    assert faults["kept"] < faults["given back"] / 10, faults
