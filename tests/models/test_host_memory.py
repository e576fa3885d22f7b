"""Freed memory is kept for the next call, and given back when asked. In processes of their own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from imprint.models.host_memory import OWN_SETTINGS

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc only")

PROGRAM = """
import resource
from imprint.models.host_memory import give_freed_memory_back, keep_freed_memory

def faults_of_a_call():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    [bytearray(size * 2**20) for size in (3, 40, 50)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

kept = keep_freed_memory()
first, again = faults_of_a_call(), faults_of_a_call()
give_freed_memory_back()
print(int(kept), first, again, faults_of_a_call())
"""


def run(**variables: str) -> list[int]:
    environ = {name: value for name, value in os.environ.items() if name not in OWN_SETTINGS}
    command = [sys.executable, "-c", PROGRAM]
    output = subprocess.run(command, env=environ | variables, capture_output=True, check=True)
    return [int(word) for word in output.stdout.split()]


def test_freed_memory_is_kept_until_it_is_given_back() -> None:
    kept, first, again, after = run()
    assert kept
    assert 10 * again < min(first, after)


def test_what_the_environment_says_of_malloc_stands() -> None:
    kept, first, again, _ = run(MALLOC_TRIM_THRESHOLD_="131072")
    assert not kept
    assert 10 * again > first
