"""The JSON schema of cluster.yaml, for editors: pdserve's part is generated from the models, Ray's keys are
left free.

The committed copy is made by: python -m pdserve.core.config_schema > docs/cluster.schema.json
"""

import json
from typing import Any

from .config import ClusterConfig


def cluster_schema() -> dict[str, Any]:
    """The schema of the whole file, which `ray up` reads too."""
    ours = ClusterConfig.model_json_schema()
    definitions = ours.pop("$defs")
    metadata = {"type": "object", "required": ["pdserve"], "properties": {"pdserve": ours}}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "cluster.yaml",
        "type": "object",
        "required": ["metadata"],
        "properties": {"metadata": metadata},
        "$defs": definitions,
    }


def cluster_schema_text() -> str:
    return json.dumps(cluster_schema(), indent=2) + "\n"


if __name__ == "__main__":
    print(cluster_schema_text(), end="")
