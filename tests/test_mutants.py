"""The planted faults of ``make mutants``: that they are what they say, and that a fault is told from none."""

from __future__ import annotations

from dataclasses import replace
from subprocess import CompletedProcess

import mutants
import pytest


def test_every_fault_changes_a_text_that_stands_once():
    assert mutants.out_of_date(mutants.FAULTS) == []
    assert len(mutants.FAULTS) >= 30
    assert {fault.file.partition("/")[0] for fault in mutants.FAULTS} == {"kernels", "csrc", "vgkern"}


def test_a_fault_that_is_out_of_date_is_named():
    fault = replace(mutants.FAULTS[0], old="no such text in the file")
    assert mutants.out_of_date([fault]) == [f"{fault.name}: its text stands 0 times in {fault.file}"]


def test_the_first_failure_is_found():
    def ended(code: int, output: str) -> CompletedProcess[str]:
        return CompletedProcess([], code, output, "")

    passed = "tests/test_a.py::test_b[x y] PASSED [ 50%]\n"
    assert mutants.first_failure(ended(0, passed)) == ""
    failed = passed + "FAILED tests/test_a.py::test_c[1-2] - assert 1 == 2\n1 failed, 1 passed\n"
    assert mutants.first_failure(ended(1, failed)) == "tests/test_a.py::test_c[1-2]"
    assert mutants.first_failure(ended(-11, passed + "tests/test_a.py::test_d[3] ")) == "tests/test_a.py::test_d[3]"
    with pytest.raises(RuntimeError, match="ended with 4"):
        mutants.first_failure(ended(4, "ERROR: usage"))
