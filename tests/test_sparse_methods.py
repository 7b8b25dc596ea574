"""The contract of methods that leave elements of task vectors out; the others' are in test_merging_methods.py.

A file of their own, because a file is tested by one process, and most of it is the compiling of passes.
"""

from __future__ import annotations

from typing import ClassVar

from evomerge.method import own_methods
from evomerge.testing.methods import MethodContract

METHODS = own_methods()


class TestTies(MethodContract):
    method = METHODS["ties"]


class TestBreadcrumbs(MethodContract):
    method = METHODS["breadcrumbs"]


class TestBreadcrumbsTies(MethodContract):
    method = METHODS["breadcrumbs_ties"]


class TestDareLinear(MethodContract):
    method = METHODS["dare_linear"]


class TestDareTies(MethodContract):
    method = METHODS["dare_ties"]


class TestDellaLinear(MethodContract):
    method = METHODS["della_linear"]


class TestDella(MethodContract):
    method = METHODS["della"]


class TestSce(MethodContract):
    method = METHODS["sce"]
    whole: ClassVar = {"select_topk": 1.0}


class TestCabs(MethodContract):
    method = METHODS["cabs"]
