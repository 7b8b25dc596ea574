"""The files that start a search on a cluster: the Slurm script on a pretended Slurm, the manifests against what KubeRay
and Kubernetes take, and the image.
"""

from __future__ import annotations

import copy
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import psutil
import pytest
import yaml
from helpers_miniature import ROOT, environment, search_file

from evomerge.search.settings.folder import open_store

SBATCH = ROOT / "scripts/slurm/search.sbatch"
MANIFESTS = sorted((ROOT / "scripts/kubernetes").glob("*.yaml"))
GOLDEN = Path(__file__).parent / "golden"
VENV = Path(sys.executable).parent

# ---- Slurm -----------------------------------------------------------------------------------------------------------

# Each runs on this machine what Slurm would run on a node, and writes down how it was called.
SRUN = """#!/usr/bin/env bash
echo "srun $*" >>"$SLURM_PRETENDED"
while [[ "$1" == --* ]]; do shift; done
export SLURM_GPUS_ON_NODE=0
exec "$@"
"""
SCONTROL = """#!/usr/bin/env bash
echo "scontrol $*" >>"$SLURM_PRETENDED"
if [[ "$1 $2" == "show hostnames" ]]; then printf '%s\\n' "${3//,/$'\\n'}"; fi
"""


class Slurm:
    """An allocation of two nodes, both of them this machine."""

    def __init__(self, folder: Path, job: int) -> None:
        self.calls = folder / "calls"
        self._folder, self._job = folder, job
        tools = folder / "tools"
        tools.mkdir()
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            (tools / name).write_text(text)
            (tools / name).chmod(0o755)
        self._path = f"{tools}{os.pathsep}{VENV}{os.pathsep}{os.environ['PATH']}"

    def run(self, restarts: int = 0) -> subprocess.Popen[str]:
        """Run the script as ``sbatch`` would; call again for a requeued job."""
        return subprocess.Popen(
            ["bash", str(SBATCH)], cwd=self._folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=environment() | {
                "PATH": self._path, "SLURM_PRETENDED": str(self.calls), "SLURM_JOB_ID": str(self._job),
                "SLURM_JOB_NODELIST": "left,right", "SLURM_CPUS_PER_TASK": "1", "SLURM_RESTART_COUNT": str(restarts),
                "SEARCH_DIR": str(self._folder / "search"),
            },
        )  # fmt: skip


def left_of(job: int) -> list[psutil.Process]:
    """The processes that a pretended job has left behind. A worker of Ray's ends itself once its node has."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("SLURM_JOB_ID") == str(job):
                found.append(process)
        except psutil.Error:
            continue
    _, alive = psutil.wait_procs(found, timeout=30)
    return alive


@pytest.mark.nightly
@pytest.mark.timeout(300)
def test_a_search_runs_stops_when_its_time_is_up_and_resumes_when_requeued(tmp_path: Path) -> None:
    job = 700_000 + os.getpid()
    slurm = Slurm(tmp_path, job)
    search_file(tmp_path, budget={"candidates": 400}, cluster={"workers": 1})
    folder = tmp_path / "search"
    first = slurm.run()
    try:
        scored = 0
        while first.poll() is None and scored < 2:
            time.sleep(0.1)
            if (folder / "search.db").is_file():
                with open_store(folder) as store:
                    scored = store.counts()["done"]
        first.send_signal(signal.SIGUSR1)
        out, _ = first.communicate(timeout=120)
        assert first.returncode == 130, out
        calls = slurm.calls.read_text().splitlines()
        assert calls[-1] == f"scontrol requeue {job}"
        assert [call for call in calls if "--nodelist=left" in call and "--head" in call]
        assert [call for call in calls if "--nodelist=right" in call and "--address=" in call]
        assert "--set pool=ray" not in out  # the command is ours, not an error that repeats it
        assert left_of(job) == []

        with open_store(folder) as store:
            before = store.counts()
            assert store.search().state == "stopped"
        settings = yaml.safe_load((folder / "search.yaml").read_text())
        settings["budget"]["candidates"] = sum(before.values()) + 2
        (folder / "search.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
        again = slurm.run(restarts=1)
        out, _ = again.communicate(timeout=180)
        assert again.returncode == 0, out
        with open_store(folder) as store:
            assert store.search().state == "finished"
            assert store.counts()["done"] + store.counts()["cached"] > before["done"]
        assert not slurm.calls.read_text().endswith(f"requeue {job}\n")
    finally:
        left = left_of(job)
        for process in left:
            process.kill()
        shutil.rmtree(f"/tmp/evomerge-{job}", ignore_errors=True)
    assert left == []


def test_the_slurm_script_is_clean_and_has_the_options_that_it_relies_on() -> None:
    command = [str(VENV / "shellcheck"), str(SBATCH)]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
    text = SBATCH.read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", text, re.MULTILINE))
    assert {"requeue", "nodes", "gpus-per-node"} <= options.keys()
    assert (options["ntasks-per-node"], options["open-mode"]) == ("1", "append")
    signal_at = re.fullmatch(r"B:USR1@(\d+)", options["signal"])
    grace = re.search(r"^GRACE=(\d+)", text, re.MULTILINE)
    assert signal_at is not None
    assert grace is not None
    assert int(signal_at[1]) >= int(grace[1]) + 60  # stopping, confirming nothing, ending Ray and requeueing come after
    assert not re.search(r"\bray stop\b|\bpkill\b|\bkillall\b|--array", text)


# ---- Kubernetes ------------------------------------------------------------------------------------------------------

FIELDS: dict[str, dict[str, Any]] = yaml.safe_load((GOLDEN / "kubernetes_fields.yaml").read_text())
QUANTITY = r"^\d+(\.\d+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$"  # https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/quantity
SIMPLE: dict[str, dict[str, Any]] = {
    "string": {"type": "string"},
    "integer": {"type": "integer", "minimum": 0},
    "boolean": {"type": "boolean"},
    "quantity": {"type": "string", "pattern": QUANTITY},
    "strings": {"type": "object", "additionalProperties": {"type": "string"}},
    "quantities": {"type": "object", "additionalProperties": {"type": "string", "pattern": QUANTITY}},
}


def schema_of(kind: Any) -> dict[str, Any]:
    """The JSON schema of an entry of the table: a field that is not in it is refused, as `kubectl` does."""
    if isinstance(kind, list):
        return {"enum": kind}
    if isinstance(kind, dict):
        return {"type": "array", "items": schema_of(kind["list"])}
    if kind in SIMPLE:
        return SIMPLE[kind]
    fields = FIELDS[kind]
    return {
        "type": "object",
        "additionalProperties": False,
        "required": [name[:-1] for name in fields if name.endswith("*")],
        "properties": {name.rstrip("*"): schema_of(inner) for name, inner in fields.items()},
    }


def documents() -> list[tuple[str, dict[str, Any]]]:
    return [
        (f"{path.stem}/{document['kind']}", document)
        for path in MANIFESTS
        for document in yaml.safe_load_all(path.read_text())
    ]


def sections(value: Any) -> Iterator[dict[str, Any]]:
    """Every mapping inside a document whose keys are fields, not names that people choose."""
    if isinstance(value, dict):
        yield value
        for key, inner in value.items():
            if key not in ("labels", "matchLabels", "rayStartParams", "requests", "limits") and inner != {}:
                yield from () if key == "metadata" and "name" not in inner else sections(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from sections(inner)


def pod_templates() -> list[tuple[str, dict[str, Any]]]:
    return [
        (name, section["spec"])
        for name, document in documents()
        for section in sections(document)
        if "containers" in section.get("spec", {})
    ]


@pytest.mark.parametrize(("name", "document"), documents(), ids=lambda value: value if isinstance(value, str) else "")
def test_manifests_are_what_kubernetes_takes_and_every_unknown_field_is_refused(
    name: str, document: dict[str, Any]
) -> None:
    schema = jsonschema.Draft202012Validator(schema_of(document["kind"]))
    schema.validate(document)
    whole = list(sections(document))
    assert len(whole) > 3
    for number in range(len(whole)):
        mutant = copy.deepcopy(document)
        list(sections(mutant))[number]["replica"] = "1"
        with pytest.raises(jsonschema.ValidationError, match="'replica' was unexpected"):
            schema.validate(mutant)


@pytest.mark.parametrize(("name", "pod"), pod_templates(), ids=lambda value: value if isinstance(value, str) else "")
def test_pods_are_not_root_and_have_what_they_mount(name: str, pod: dict[str, Any]) -> None:
    security = pod["securityContext"]
    assert security["runAsNonRoot"]
    assert security["runAsUser"] == 1000  # that of the image
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    volumes = {volume["name"] for volume in pod.get("volumes", [])}
    for container in pod["containers"]:
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert {mount["name"] for mount in container.get("volumeMounts", [])} == volumes
        gpus = [container["resources"][kind].get("nvidia.com/gpu") for kind in ("requests", "limits")]
        assert gpus[0] == gpus[1]
        assert (gpus[0] is not None) == (container["name"] == "ray-worker")


def test_manifests_name_what_the_others_make() -> None:
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for _, document in documents():
        by_kind.setdefault(document["kind"], []).append(document)
    claims = {claim["metadata"]["name"] for claim in by_kind["PersistentVolumeClaim"]}
    for _, pod in pod_templates():
        named = {
            v["persistentVolumeClaim"]["claimName"] for v in pod.get("volumes", ()) if "persistentVolumeClaim" in v
        }
        assert named <= claims
    (job,), (cluster,), (launch,) = by_kind["RayJob"], by_kind["RayCluster"], by_kind["Job"]
    for spec in (job["spec"]["rayClusterSpec"], cluster["spec"]):
        assert spec["authOptions"] == {"mode": "token"}
        pins = (ROOT / "constraints.txt").read_text().splitlines()
        assert f"ray=={spec['rayVersion']}" in pins
        assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        heads = spec["headGroupSpec"]["template"]["metadata"]["labels"]
        for budget in by_kind["PodDisruptionBudget"]:
            assert budget["spec"]["selector"]["matchLabels"].items() <= heads.items()
    (container,) = launch["spec"]["template"]["spec"]["containers"]
    name = cluster["metadata"]["name"]
    assert f"--address=http://{name}-head-svc:8265" in container["args"]
    token = next(each for each in container["env"] if each["name"] == "RAY_AUTH_TOKEN")
    assert token["valueFrom"]["secretKeyRef"] == {"name": name, "key": "auth_token"}  # as KubeRay makes it


@pytest.mark.parametrize(
    ("there", "code", "expected", "ends"),
    [(False, 0, "search /file/search.yaml --dir {0}", 0), (True, 0, "resume {0}", 0), (True, 130, "resume {0}", 0),
     (True, 1, "resume {0}", 1), (False, 2, "search /file/search.yaml --dir {0}", 2)],
)  # fmt: skip
def test_the_command_of_the_job_resumes_and_takes_a_stopped_search_as_done(
    tmp_path: Path, there: bool, code: int, expected: str, ends: int
) -> None:
    (job,) = [document for _, document in documents() if document["kind"] == "RayJob"]
    folder = tmp_path / "ja-math"
    if there:
        folder.mkdir()
        (folder / "search.yaml").touch()
    (tmp_path / "evomerge").write_text(f'#!/bin/sh\necho "$@"\nexit {code}\n')
    (tmp_path / "evomerge").chmod(0o755)
    command = job["spec"]["entrypoint"].replace("/searches/ja-math", str(folder))
    path = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["sh", "-c", command], env=path, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == expected.format(folder)
    assert done.returncode == ends


# ---- the image -------------------------------------------------------------------------------------------------------


def test_the_image_has_what_kuberay_runs_in_it() -> None:
    """KubeRay starts Ray with bash and asks for its health with wget; without the job server nothing is submitted."""
    text = (ROOT / "Dockerfile").read_text()
    assert re.search(r"--no-install-recommends .*\bwget\b", text)
    assert re.search(r"^FROM \S+:[\d.]+-base-ubuntu\d\d\.\d\d$", text, re.MULTILINE)  # a version, never `latest`
    assert not re.search(r"^(ADD|SHELL) |sudo|chmod 777|curl", text, re.MULTILINE)
