"""In-context reinforcement learning with Mamba: the library behind the book.

Public names are imported on first use, so that `import adbook.training` needs neither gymnasium nor mujoco nor
stable-baselines3.
"""

from importlib import import_module

# Imported at once: a function that bears its module's name must be bound after the import system binds the module.
from adbook.rollout import Rollout, rollout

_MODULES = {
    "family": "tasks",
    "Task": "tasks",
    "TaskFamily": "tasks",
    "FAMILIES": "tasks",
    "LearningHistory": "histories",
    "read_histories": "histories",
    "record": "generation",
    "load_histories": "datasets",
    "Oracle": "oracle",
    "selective_scan": "scan",
    "Mamba": "mamba",
    "MambaConfig": "mamba",
    "Transformer": "transformer",
    "TransformerConfig": "transformer",
    "WindowConfig": "windows",
    "Windows": "windows",
    "ADPolicy": "policy",
    "PolicyConfig": "policy",
    "TrainingConfig": "training",
    "train": "training",
    "Profile": "experiments",
    "profile": "experiments",
    "source_histories": "experiments",
    "trained_policy": "checkpoints",
    "references": "experiments",
    "evaluate": "experiments",
    "source_rollout": "replay",
    "RolloutPlayer": "player",
    "LivePlayer": "live",
    "LiveReacher": "exhibit",
    "Watched": "insight",
}

__version__ = "0.1.0"
__all__ = ["Rollout", "__version__", "rollout", *_MODULES]


def __getattr__(name: str):
    """Import a public name from its module on first use (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module 'adbook' has no attribute {name!r}; public names: {', '.join(sorted(_MODULES))}")
    value = getattr(import_module(f"adbook.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
