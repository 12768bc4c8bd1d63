"""Networks other than `ADPolicy`, and trainings that may be interrupted, on disk.

Each is one safetensors file, with what it is in its header.
"""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim import Optimizer

from adbook.files import write_whole

_TRAINING = "adbook.training"
SCHEMA = 1  # of the file format; raise it when a stored field changes meaning or shape
Module = TypeVar("Module", bound=nn.Module)


def save_module(
    path: str | os.PathLike, module: nn.Module, described: dict[str, Any], *, half: Iterable[str] = ()
) -> Path:
    """Write a module's parameters and buffers, and what `load_module` makes it from again.

    Args:
        path: of the file.
        module: the module; its class is written down too.
        described: anything JSON can hold.
        half: names of tensors to keep in 16 bits; reading gives 32 again.

    Raises:
        ValueError: a finite number that 16 bits cannot hold.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}
    for name in half:
        narrow = tensors[name].half()
        if not torch.equal(narrow.isfinite(), tensors[name].isfinite()):
            raise ValueError(f"{name} holds numbers above 65,504, too large for 16 bits; keep it in 32")
        tensors[name] = narrow
    header = {"kind": _kind(type(module)), "schema": str(SCHEMA), "json": json.dumps(described)}
    return write_whole(path, lambda file: file.write_bytes(save(tensors, header)))


def load_module(path: Path, kind: type[Module], make: Callable[[dict[str, Any]], Module]) -> Module:
    """Read what `save_module` wrote, in evaluation mode.

    Args:
        path: of the file.
        kind: the class it has to be of.
        make: builds the module from what `save_module` was given as `described`.

    Raises:
        ValueError: the file is damaged, foreign, or of another schema version.
    """
    try:
        with safe_open(path, framework="pt") as opened:
            header = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
        described = json.loads(header.get("json", "{}"))
    except (SafetensorError, json.JSONDecodeError) as error:
        raise _unreadable(path, kind, error) from error
    if (header.get("kind"), header.get("schema")) != (_kind(kind), str(SCHEMA)):
        there = f"{header.get('kind')} of schema {header.get('schema')}"
        raise ValueError(f"{path} holds {there}, not {_kind(kind)} of schema {SCHEMA}; delete it to train it again")
    try:
        module = make(described)
        module.load_state_dict(tensors)
    # RuntimeError: a tensor that is missing or of another shape; ValueError: settings that cannot run
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        raise _unreadable(path, kind, error) from error
    return module.eval()


def save_training(
    path: str | os.PathLike, module: nn.Module, optimizers: Sequence[Optimizer], identity: str, log: dict[str, Any]
) -> None:
    """Write what a training needs to go on.

    Args:
        path: of the file.
        module: all that is trained.
        optimizers: of its parameters.
        identity: tells this training from every other.
        log: anything JSON can hold.
    """
    tensors = {f"policy/{name}": value.contiguous() for name, value in module.state_dict().items()}
    for prefix, optimizer in zip(_prefixes(optimizers), optimizers, strict=True):
        for i, state in optimizer.state_dict()["state"].items():
            tensors |= {f"{prefix}/{i}/{name}": value for name, value in state.items()}
    header = {"kind": _TRAINING, "identity": identity, "log": json.dumps(log)}
    write_whole(path, lambda file: file.write_bytes(save(tensors, header)))


def load_training(
    path: str | os.PathLike, module: nn.Module, optimizers: Sequence[Optimizer], identity: str
) -> dict[str, Any]:
    """Set module and optimisers to what `save_training` wrote, and return its log.

    Raises:
        ValueError: the file is damaged, or of another training.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise _damaged(path, error) from error
    if header.get("kind") != _TRAINING or header.get("identity") != identity:
        raise ValueError(
            f"{path} is a checkpoint of another model, configuration or set of histories; give another file, or "
            "delete it to train from the start"
        )
    try:
        log = json.loads(header["log"])
        module.load_state_dict({n.removeprefix("policy/"): t for n, t in tensors.items() if n.startswith("policy/")})
        for prefix, optimizer in zip(_prefixes(optimizers), optimizers, strict=True):
            state: dict[int, dict[str, Tensor]] = {}
            for name in (name for name in tensors if name.startswith(f"{prefix}/")):
                _, i, key = name.split("/")
                state.setdefault(int(i), {})[key] = tensors[name]
            optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    except (KeyError, TypeError, ValueError, RuntimeError, json.JSONDecodeError) as error:
        raise _damaged(path, error) from error
    return log


def _prefixes(optimizers: Sequence[Optimizer]) -> list[str]:
    return [f"optimizer{k or ''}" for k in range(len(optimizers))]


def _unreadable(path: Path, kind: type[nn.Module], error: Exception) -> ValueError:
    return ValueError(f"{path} is damaged or not of {_kind(kind)} ({error!r}); delete it to train it again")


def _damaged(path: str | os.PathLike, error: Exception) -> ValueError:
    return ValueError(f"{path} is damaged ({error!r}); delete it to train from the start")


def _kind(module: type[nn.Module]) -> str:
    return f"adbook.{module.__name__}"
