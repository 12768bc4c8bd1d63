"""Networks other than `ADPolicy` on disk: one safetensors file each, with what they are in its header."""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from adbook.files import write_whole

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
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}
    tensors |= {name: tensors[name].half() for name in half}
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
            if (header.get("kind"), header.get("schema")) != (_kind(kind), str(SCHEMA)):
                there = f"{header.get('kind')} of schema {header.get('schema')}"
                raise ValueError(f"{path} holds {there}, not {_kind(kind)} of schema {SCHEMA}; train it again")
            module = make(json.loads(header["json"]))
            module.load_state_dict({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
    # RuntimeError: a tensor that is missing or of another shape
    except (SafetensorError, RuntimeError, KeyError, TypeError, json.JSONDecodeError) as error:
        told = f"{path} is damaged or not of {_kind(kind)} ({error!r}); train it again"
        raise ValueError(told) from error
    return module.eval()


def _kind(module: type[nn.Module]) -> str:
    return f"adbook.{module.__name__}"
