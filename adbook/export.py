"""A policy for the browser: its weights in one binary file, and what a page must know of them in one of JSON.

``web/network.js`` runs what is written here. Both files have a schema version; the JSON file also has the other one's
length and check sum, so that a page can tell a damaged download from a bad policy.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from pathlib import Path
from typing import Any

import torch

from adbook.files import write_whole
from adbook.play import check_fits
from adbook.policy import ADPolicy
from adbook.tasks import TaskFamily

SCHEMA = 1  # of the two files; raise it when what is in them changes meaning
RUNS = ("reacher-goal", "pusher-goal", "half-cheetah-vel")  # families whose robots a page can move
TOKEN = ("observation before", "action before", "reward before", "observation", "start")
_KIND = "adbook.export"
_TYPES = {16: torch.float16, 32: torch.float32}
_STATISTICS = ("observation_mean", "observation_std", "reward_mean", "reward_std")


def export(
    policy: ADPolicy,
    path: str | os.PathLike[str],
    family: TaskFamily,
    *,
    bits: int = 16,
    about: dict[str, Any] | None = None,
) -> Path:
    """Write a policy for the browser.

    Args:
        policy: with Mamba inside.
        path: of a folder, which receives ``policy.json`` and ``weights.bin``; made if missing.
        family: whose tasks it plays.
        bits: 16 or 32 for a weight.
        about: what else the page is to know, anything JSON can hold; the exhibit needs `adbook.exhibit.about`.

    Returns:
        The folder.

    Raises:
        ValueError: the page cannot run the policy or the family, they do not fit each other, or a number is not finite
            or too large for 16 bits.
    """
    header, weights = exported(policy, family, bits=bits, about=about)
    folder = Path(path)
    write_whole(folder / "weights.bin", lambda file: file.write_bytes(weights))
    return write_whole(folder / "policy.json", lambda file: file.write_text(json.dumps(header) + "\n")).parent


def exported(
    policy: ADPolicy, family: TaskFamily, *, bits: int = 16, about: dict[str, Any] | None = None
) -> tuple[dict[str, Any], bytes]:
    """What `export` writes: the content of ``policy.json``, and that of ``weights.bin``."""
    _check(policy, family, bits)
    config, tensors = policy.config, dict(policy.named_parameters())
    weights = b"".join(_bytes(name, value.detach(), bits) for name, value in tensors.items())
    shape = {name: getattr(config.backbone, name) for name in ("n_layers", "d_model", "d_inner", "d_state", "d_conv")}
    numbers = {name: getattr(policy, name).tolist() for name in _STATISTICS}
    names = ("observation_size", "action_size", "action_scale", "head", "log_std_min", "log_std_max")
    header = {
        "kind": _KIND,
        "schema": SCHEMA,
        "family": family.name,
        **{name: getattr(config, name) for name in names},
        "shape": shape,
        "token": TOKEN,
        "normalisation": numbers | {name: numbers[name][0] for name in ("reward_mean", "reward_std")},
        "weights": {"bits": bits, "bytes": len(weights), "crc32": zlib.crc32(weights)},
        "tensors": [(name, value.numel()) for name, value in tensors.items()],
        "about": about or {},
    }
    return header, weights


def _check(policy: ADPolicy, family: TaskFamily, bits: int) -> None:
    if family.name not in RUNS:
        raise ValueError(f"a page cannot run {family.name}; it can run {', '.join(RUNS)}")
    if bits not in _TYPES:
        raise ValueError(f"bits={bits!r} must be 16 or 32")
    if not isinstance(policy, ADPolicy):
        raise ValueError(f"a {type(policy).__name__} cannot be exported; give an ADPolicy with Mamba inside")
    if policy.config.backbone_name != "mamba":
        raise ValueError(
            f"the page's network is Mamba, this policy's backbone is {policy.config.backbone_name}: "
            "export a policy whose backbone is MambaConfig(…)"
        )
    if policy.config.return_to_go:
        raise ValueError("the page cannot show a return-to-go: export a policy trained with return_to_go=False")
    check_fits(policy, family)
    numbers = [*(getattr(policy, name) for name in _STATISTICS), policy.config.log_std_min, policy.config.log_std_max]
    if not all(torch.as_tensor(number).isfinite().all() for number in numbers):
        raise ValueError("the policy's normalisation or its bounds of log σ are not finite; train it again")


def _bytes(name: str, value: torch.Tensor, bits: int) -> bytes:
    stored = value.cpu().to(_TYPES[bits])
    if not stored.isfinite().all():
        worst = value.abs().max().item()
        remedy = "use bits=32" if math.isfinite(worst) else "train it again"
        raise ValueError(f"{name} has a weight of {worst:g}, which {bits} bits cannot hold; {remedy}")
    return stored.numpy().astype(stored.numpy().dtype.newbyteorder("<")).tobytes()
