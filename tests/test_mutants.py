"""The planted faults of ``make mutants``: that they are what they say, and that a fault is told from none."""

from __future__ import annotations

import re
from dataclasses import replace
from subprocess import CompletedProcess

import mutants
import pytest


def test_every_fault_changes_a_text_that_stands_once():
    assert mutants.out_of_date(mutants.FAULTS) == []
    assert len(mutants.FAULTS) >= 30
    assert {fault.file.partition("/")[0] for fault in mutants.FAULTS} == {"kernels", "csrc", "vgkern"}


def test_every_fault_names_tests_that_exist():
    paths = sorted({path for fault in mutants.FAULTS for path in fault.tests.partition("|")[0].split()})
    listed = mutants.pytest(mutants.ROOT, "--collect-only", "-qq", *paths).stdout
    found = re.findall(r"^tests/.+::.+$", listed, re.MULTILINE)

    def selects(expression: str, test: str) -> bool:
        """As -k does it, for the words, parentheses, and, or and not that stand there."""
        words = re.sub(r"\b(?!(?:and|or|not)\b)[\w.]+", lambda word: str(word[0].lower() in test.lower()), expression)
        return bool(eval(words or "True"))

    for fault in mutants.FAULTS:
        paths, _, expression = fault.tests.partition("|")
        for path in paths.split():
            assert any(test.startswith(path) for test in found), fault
        assert any(test.startswith(tuple(paths.split())) and selects(expression, test) for test in found), fault


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
