"""The committed code matches the .proto file, and every field has a comment or is self-explanatory."""

import subprocess
import sys
from pathlib import Path

import pytest

from pdserve.proto import pdserve_pb2 as pb

ROOT = Path(__file__).resolve().parents[2]
GENERATED = ("pdserve_pb2.py", "pdserve_pb2.pyi", "pdserve_pb2_grpc.py", "pdserve_pb2_grpc.pyi")


def test_the_generated_code_is_fresh(tmp_path: Path) -> None:
    subprocess.run(
        [ROOT / "scripts" / "generate_proto", tmp_path],
        check=True,
        env={"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"},
    )
    for name in GENERATED:
        fresh = (tmp_path / "pdserve" / "proto" / name).read_text()
        assert (ROOT / "proto" / name).read_text() == fresh, f"{name} is stale: run scripts/generate_proto"


def test_generated_modules_import_each_other_as_parts_of_the_package() -> None:
    text = (ROOT / "proto" / "pdserve_pb2_grpc.py").read_text()
    assert "from pdserve.proto import pdserve_pb2" in text
    assert pb.DESCRIPTOR.package == "pdserve.v1"


@pytest.mark.parametrize("message", ["SamplingParams", "GenerateRequest", "ModelInfo", "WorkerStatus"])
def test_numbers_of_fields_are_contiguous(message: str) -> None:
    fields = pb.DESCRIPTOR.message_types_by_name[message].fields
    assert [field.number for field in fields] == list(range(1, len(fields) + 1))


def test_sampling_parameters_are_those_of_the_core() -> None:
    from pdserve.core.request import SamplingParams

    fields = {field.name for field in pb.SamplingParams.DESCRIPTOR.fields}
    # a constraint becomes a grammar on the way
    assert fields - {"constraint"} == set(SamplingParams.__struct_fields__) - {"grammar"}
