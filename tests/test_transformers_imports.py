"""What is imported with transformers, in a process of its own: this one has imported all there is."""

from __future__ import annotations

import subprocess
import sys

_CODE = """
import sys
import evomerge
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import is_sklearn_available
from transformers.generation import candidate_generator
print(sorted({"sklearn", "scipy.stats", "pandas"} & set(sys.modules)))
print(is_sklearn_available(), candidate_generator.is_sklearn_available())
from sklearn.metrics import roc_curve
"""


def test_transformers_does_not_import_scikit_learn_which_others_still_can() -> None:
    done = subprocess.run([sys.executable, "-c", _CODE], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.splitlines() == ["[]", "True False"]
