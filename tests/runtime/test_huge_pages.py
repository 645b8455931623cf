"""Huge pages: the environment, and a program that starts itself anew."""

import os
import platform
import subprocess
import sys

import pytest

from jaxstack.runtime.memory import with_huge_pages


def test_the_environment_says_it_once_and_keeps_the_rest():
    assert with_huge_pages({"A": "b"}) == {"A": "b", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    other = {"GLIBC_TUNABLES": "glibc.malloc.arena_max=1"}
    assert with_huge_pages(other)["GLIBC_TUNABLES"] == "glibc.malloc.arena_max=1:glibc.malloc.hugetlb=1"
    for said in ("glibc.malloc.hugetlb=0", "glibc.malloc.arena_max=1:glibc.malloc.hugetlb=2"):
        assert with_huge_pages({"GLIBC_TUNABLES": said}) == {"GLIBC_TUNABLES": said}


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_a_program_starts_anew_once_with_its_arguments_and_process_id():
    program = (
        "import os, sys\n"
        "print(os.getpid(), sys.argv[1:], 'jax' in sys.modules, os.environ.get('GLIBC_TUNABLES'), flush=True)\n"
        "from jaxstack.runtime.memory import restart_with_huge_pages\n"
        "restart_with_huge_pages()\n"
        "print('jax' in sys.modules)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    arguments = ["--a=b c", "d"]
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments], env=environment, stdout=subprocess.PIPE, text=True
    )
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 0
    assert out.splitlines() == [
        f"{process.pid} {arguments} False None",
        f"{process.pid} {arguments} False glibc.malloc.hugetlb=1",
        "False",  # what it needs for that is imported in no time
    ]
