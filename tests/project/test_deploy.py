"""Files for other people's programs, checked by their schemas where there is a validator; none of them was run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).parents[2]
# KServe's own fields of a predictor; the others are those of a pod.
PREDICTOR = {"maxReplicas", "minReplicas", "scaleMetric", "scaleTarget", "timeout"}


@pytest.mark.parametrize(
    ("schema", "path"),
    [
        ("vendor.compose-spec", "deploy/compose.yaml"),
        ("vendor.github-workflows", ".github/workflows/test.yml"),
        ("vendor.github-workflows", ".github/workflows/wheels.yml"),
    ],
)
def test_a_file_follows_its_schema(schema: str, path: str) -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, ROOT / path]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout


def test_the_pod_of_the_inference_service_follows_kubernetes_schema() -> None:
    service = yaml.safe_load((ROOT / "deploy" / "kserve.yaml").read_text(encoding="utf-8"))
    predictor = service["spec"]["predictor"]
    pod = {key: value for key, value in predictor.items() if key not in PREDICTOR}
    whole = {"apiVersion": "v1", "kind": "Pod", "metadata": service["metadata"], "spec": pod}
    kubernetes_validate.validate(whole, kubernetes_validate.latest_version(), strict=True)
    # What KServe takes for the model's server: https://kserve.github.io/website/latest/reference/api/
    assert [container["name"] for container in pod["containers"]] == ["kserve-container"]
