"""Tensors come back bit for bit, and equal tensors make equal files."""

import safetensors
import safetensors.torch
import torch

from vitdistill.storage.tensors import tensor_bytes


def test_tensors_are_what_safetensors_reads(tmp_path):
    tied = torch.randn(4)
    tensors = {
        "f8": torch.randn(3, 3).to(torch.float8_e4m3fn),
        "bool": torch.tensor([True, False, True]),
        "bf16": torch.randn(5).bfloat16(),
        "scalar": torch.tensor(7, dtype=torch.int64),
        "none": torch.zeros(0, 4),
        "transposed": torch.randn(4, 6).T,
        'name with " and \u00e4': torch.randn(2).double(),
        "view": torch.randn(100)[10:20:2],
        "grad": torch.nn.Parameter(torch.randn(3).half()),
        "tied": tied,
        "tied again": tied[2:],
        "int8": torch.arange(3, dtype=torch.int8),
    }
    path = tmp_path / "w.safetensors"
    content = tensor_bytes(tensors, {"format": "pt"})
    path.write_bytes(content)
    found = safetensors.torch.load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert torch.equal(
            found[name].view(-1).view(torch.uint8),
            tensor.detach().contiguous().view(-1).view(torch.uint8),
        )
    with safetensors.safe_open(path, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    assert tensor_bytes(dict(reversed(tensors.items())), {"format": "pt"}) == content
