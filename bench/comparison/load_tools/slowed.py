"""The embedded model, slowed by further layers that do not change its output.

On a machine with few cores a client's own work per token delays the server's next one. Beside a step of half
a millisecond that is most of what there is to see; beside one of some milliseconds it is not, and the text
stays as real."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from pdserve.embedded import MODEL_DIR

_FIRST_LAYER = "model.layers.0."
_ADDING = (
    "self_attn.o_proj.weight",
    "mlp.down_proj.weight",
)  # what a layer adds to the residual stream comes from these


def make_slowed(folder: Path, num_layers: int) -> Path:
    """A checkpoint of `num_layers` layers in `folder`, which must not exist. Raises ValueError for too
    few."""
    config = json.loads((MODEL_DIR / "config.json").read_text())
    own = config["num_hidden_layers"]
    if num_layers < own:
        raise ValueError(f"--layers: {num_layers} is not valid, the embedded model has {own} of its own")
    shutil.copytree(MODEL_DIR, folder)
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": num_layers}))
    tensors = load_file(MODEL_DIR / "model.safetensors")
    first = {
        name.removeprefix(_FIRST_LAYER): tensor
        for name, tensor in tensors.items()
        if name.startswith(_FIRST_LAYER)
    }
    for layer in range(own, num_layers):
        for name, tensor in first.items():
            tensors[f"model.layers.{layer}.{name}"] = (
                torch.zeros_like(tensor) if name in _ADDING else tensor.clone()
            )
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
