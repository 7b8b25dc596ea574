"""What is imported with transformers, in a process of its own: this one has imported all there is."""

from __future__ import annotations

import subprocess
import sys

import pytest

_CODE = """
import gc, sys
gc.disable()
import evomerge
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers.utils import is_scipy_available, is_sklearn_available
from transformers.generation import candidate_generator
from transformers.loss import loss_for_object_detection, loss_lw_detr
print(sorted({"sklearn", "scipy.stats", "scipy.optimize", "pandas"} & set(sys.modules)))
print(is_sklearn_available(), candidate_generator.is_sklearn_available())
print(is_scipy_available(), loss_for_object_detection.is_scipy_available(), loss_lw_detr.is_scipy_available())
import sklearn
"""


@pytest.mark.nightly  # for what it saves; what would be missing is missed by every test of models
def test_transformers_does_not_import_what_is_not_used_and_others_still_can() -> None:
    done = subprocess.run([sys.executable, "-c", _CODE], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.splitlines() == ["[]", "True False", "True False False"]
