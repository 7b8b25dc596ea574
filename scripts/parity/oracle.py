"""Runs mergekit on many configurations in one process, with the Python of its own environment.

``python oracle.py FOLDER`` merges FOLDER/NAME.yaml into FOLDER/NAME.theirs; an error goes to FOLDER/NAME.error.
"""

import logging
import sys
import traceback
from pathlib import Path

import yaml
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge


def listed(config: MergeConfiguration) -> list[ModelReference]:
    """The models in the order of the file; mergekit has a set, whose order differs between processes.

    Without a base model, mergekit takes configuration and tokenizer from the first one.
    """
    entries = [*(config.models or ()), *(source for piece in config.slices or () for source in piece.sources)]
    for module in (config.modules or {}).values():  # to which mergekit adds the others while it plans
        entries += [*(module.models or ()), *(source for piece in module.slices or () for source in piece.sources)]
    models = [config.base_model, *(entry.model for entry in entries)]
    return list(dict.fromkeys(model for model in models if model is not None))


MergeConfiguration.referenced_models = listed
logging.disable(logging.ERROR)
root = Path(sys.argv[1])
options = MergeOptions(quiet=True, random_seed=0, lora_merge_cache=str(root / "adapters"), lora_merge_dtype="float32")
for file in sorted(root.glob("*.yaml")):
    try:
        config = MergeConfiguration.model_validate(yaml.safe_load(file.read_text()))
        run_merge(config, str(file.with_suffix(".theirs")), options)
    except Exception:  # a case fails, not the run
        file.with_suffix(".error").write_text(traceback.format_exc())
