"""Training over several processes: who they are, the student split or copied over them, states put together.

torchrun and `accelerate launch` start the processes and say in the environment which is which. Without them
everything here is about one process and communicates nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from .models import MambaLM

T = TypeVar("T")


@contextmanager
def session(device: str) -> Iterator[None]:
    """Joins the processes that a launcher started, if one did. device: "cpu" or "cuda"."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    if device not in ("cpu", "cuda"):
        raise ValueError(
            f"device is {device!r}, expected 'cpu' or 'cuda': each process takes a GPU of its own"
        )
    if device == "cuda":
        torch.cuda.set_device(local_device(device))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    yield
    dist.destroy_process_group()  # not after an error: it could wait for processes that are gone


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_device(device: str) -> torch.device:
    """A GPU each for the processes of a host."""
    return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if device == "cuda" else device)


def first(function: Callable[[], T]) -> T:
    """Runs `function` on rank 0 alone; all ranks wait, return what it returned and raise what it raised."""
    result: list[Any] = [None, None]
    if rank() == 0:
        try:
            result[0] = function()
        except Exception as error:
            if world() == 1:
                raise
            result[1] = error
    if world() > 1:
        dist.broadcast_object_list(result)
    if result[1] is not None:
        raise result[1]
    return result[0]


def gather_objects(value: T) -> list[T]:
    """One from each rank."""
    values = [value] * world()
    if world() > 1:
        dist.all_gather_object(values, value)
    return values


def largest(value: int) -> int:
    """Over the ranks."""
    everywhere = torch.tensor(value)
    if world() > 1:
        dist.all_reduce(everywhere, dist.ReduceOp.MAX)
    return int(everywhere)


def mean(value: Tensor) -> Tensor:
    """Over the ranks."""
    if world() > 1:
        dist.all_reduce(value)
        value /= world()
    return value


class _Replica(nn.Module):
    """Runs a function of the model as its forward, around which DDP and FSDP do their work."""

    def __init__(self, model: MambaLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., T], *args: Any) -> T:
        return function(self.model, *args)


def replicate(model: MambaLM, strategy: str) -> Callable[..., Any]:
    """replica(function, *args) = function(model, *args), its gradients then the mean over the ranks.

    "fsdp" splits the parameters in place, a block at a time, and gathers a block's where it runs: a weight
    under fake quantization is whole, and so are its groups, before it is rounded.
    """
    replica = _Replica(model)
    if world() == 1:
        return replica
    if strategy == "ddp":
        return DistributedDataParallel(replica, gradient_as_bucket_view=True)
    mesh = dist.init_device_mesh(model.device.type, (world(),))
    for block in model.backbone.layers:
        fully_shard(block, mesh=mesh)
    return fully_shard(replica, mesh=mesh)


def summing(replica: Callable[..., Any], last: bool) -> AbstractContextManager:
    """Around one of several backward passes: DDP communicates in the last, FSDP in each, to hold shards."""
    whole = isinstance(replica, DistributedDataParallel) and not last
    return replica.no_sync() if whole else nullcontext()


def gradient_norm(parameters: list[Tensor]) -> Tensor:
    """Of the whole gradient, however it is split."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def local(tensor: Tensor) -> Tensor:
    """This rank's part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(state: Any) -> Any:
    """A state dict with split tensors put together, on rank 0; all ranks must call it."""
    if isinstance(state, dict):
        return {key: whole(value) for key, value in state.items()}
    if isinstance(state, DTensor):
        full = state.full_tensor()
        return full.cpu() if rank() == 0 else None
    return state


def split_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a whole tensor that all ranks have, where `like` is split and has its shape."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:  # an optimizer's step counter is whole
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def load(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Puts the whole state dicts state["student"] and state["optimizer"] back, split as the model is."""
    names = model.state_dict()
    model.load_state_dict(
        {k: split_like(v, names[k]) if k in names else v for k, v in state["student"].items()}
    )
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    entries = {
        i: {k: split_like(v, parameters[i]) for k, v in entry.items()}
        for i, entry in state["optimizer"]["state"].items()
    }
    optimizer.load_state_dict(state["optimizer"] | {"state": entries})
