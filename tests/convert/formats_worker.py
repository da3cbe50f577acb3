"""Logits of the Megatron model for every case in a folder; one start of Megatron serves them all.

Usage: formats_worker.py FOLDER, which holds NAME.yaml (a run) and NAME.safetensors (its weights, by Megatron's names).
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from crystal_hpc.config.load import load_run
from crystal_hpc.model import gpt, parallel


def checkpoint_name(name: str) -> str:
    """What a parameter of the model without Transformer Engine is called in a checkpoint."""
    name = name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
    return name.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")


@torch.no_grad()
def main(folder: Path) -> None:
    rows = load_file(folder / "rows")["rows"]
    positions = torch.arange(rows.shape[1]).expand_as(rows)
    cases = sorted(folder.glob("*.yaml"))
    layout = parallel.start(load_run(cases[0]), 0, 1, 0, folder / "store")
    logits = {}
    for case in cases:
        model = gpt.build(load_run(case), layout).eval()
        tensors = load_file(case.with_suffix(".safetensors"))
        parameters = {checkpoint_name(name): parameter for name, parameter in model.named_parameters()}
        assert parameters.keys() == tensors.keys(), parameters.keys() ^ tensors.keys()
        for name, parameter in parameters.items():
            assert parameter.shape == tensors[name].shape, name
            parameter.copy_(tensors[name])
        logits[case.stem] = model(input_ids=rows, position_ids=positions, attention_mask=None).contiguous()
    save_file(logits, folder / "logits")
    parallel.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
