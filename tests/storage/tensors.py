"""Tensors saved as files of every format, and the dataset that they become."""

from pathlib import Path

import ml_dtypes
import numpy as np
import torch
import zarr
from safetensors.torch import save_file

AXES = {"bhnd": (0, 1, 2, 3), "bnhd": (0, 2, 1, 3), "hnd": (0, 1, 2), "nhd": (1, 0, 2)}  # from [B, H, N, D], to and fro


def make_tensors(dtype=np.float32, layout="bhnd", heads=4, kv_heads=2, tokens=70, head_dim=8):
    """q, k, v as the dataset should hold them [B, H, N, D], and as a file in `layout` holds them."""
    generator = np.random.default_rng(0)
    batch = 2 if "b" in layout else 1
    held = {
        name: generator.standard_normal((batch, count, tokens, head_dim)).astype(dtype)
        for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
    }
    filed = {n: np.transpose(t if "b" in layout else t[0], AXES[layout]) for n, t in held.items()}
    return held, filed


def to_torch(array: np.ndarray) -> torch.Tensor:
    array = np.ascontiguousarray(array)
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def save_npy(folder: Path, tensors: dict[str, np.ndarray]) -> dict[str, str]:
    for name, tensor in tensors.items():
        np.save(folder / f"{name}.npy", tensor)
    return {name: str(folder / f"{name}.npy") for name in tensors}


def save_safetensors(folder: Path, tensors: dict[str, np.ndarray]) -> dict[str, str]:
    """All in one file; v under another name, so that it has to be named."""
    names = {"q": "q", "k": "k", "v": "model.layers.0.value"}
    save_file({names[name]: to_torch(tensor) for name, tensor in tensors.items()}, folder / "qkv.safetensors")
    return {n: f"{folder}/qkv.safetensors" + (f":{names[n]}" if n == "v" else "") for n in tensors}


def save_torch(folder: Path, tensors: dict[str, np.ndarray]) -> dict[str, str]:
    """q alone in its file; k and v in a dict."""
    torch.save(to_torch(tensors["q"]), folder / "q.pt")
    torch.save({name: to_torch(tensors[name]) for name in "kv"}, folder / "kv.pt")
    return {"q": f"{folder}/q.pt", "k": f"{folder}/kv.pt", "v": f"{folder}/kv.pt:v"}


def check_dataset(path: Path, held: dict[str, np.ndarray]) -> None:
    group = zarr.open_group(path, mode="r")
    for name, tensor in held.items():
        assert group[name].dtype == tensor.dtype
        np.testing.assert_array_equal(group[name][...], tensor)
