"""Everything that hangs on a trainer as one state dict, so that an interrupted run goes on where it was."""

from __future__ import annotations

import random
from collections import deque

import numpy as np
import torch
from torch import Tensor, nn

PLAIN = (bool, int, float, str, type(None))
PLAIN_NUMBERS = (bool, int, float)
GENERATORS = (torch.Generator, random.Random, np.random.RandomState, np.random.Generator)
MODULE_INTERNALS = set(vars(nn.Module()))


class TrainerState:
    """Everything that hangs on a trainer, as one state dict: it takes the optimiser's place in a checkpoint."""

    def __init__(self, sae: nn.Module):  # an imperative.Imperative
        self.sae = sae

    def state_dict(self) -> dict:
        return captured(vars(self.sae.trainer)) | {"__names__": self.sae._names}

    def load_state_dict(self, state: dict) -> None:
        self.sae._names = state.pop("__names__")
        with torch.no_grad():
            restored(vars(self.sae.trainer), state)


def captured(value, depth: int = 0):
    """Tensors, numbers, containers, modules, optimisers, schedulers as plain containers; `Skip` for the rest."""
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy()) if value.dtype != object else Skip
    if isinstance(value, GENERATORS):
        return _generator_state(value)
    if isinstance(value, nn.Module):
        own = {k: v for k, v in vars(value).items() if k not in MODULE_INTERNALS}
        below = {n: captured({k: v for k, v in vars(m).items() if k not in MODULE_INTERNALS}, depth + 1)
                 for n, m in value.named_modules() if n}
        return dict(state=dict(value.state_dict()), own=captured(own, depth + 1), modules=below)
    if hasattr(value, "state_dict") and hasattr(value, "load_state_dict"):
        # the counters of an optimiser written in the file are not in its state dict
        own = {k: v for k, v in vars(value).items() if isinstance(v, PLAIN)} if _of_the_file(value) else {}
        return dict(state=captured(value.state_dict(), depth + 1), own=own)
    if depth > 8:
        return Skip
    if isinstance(value, dict):
        entries = {k: captured(v, depth + 1) for k, v in value.items() if isinstance(k, (*PLAIN, tuple))}
        return {k: entry for k, entry in entries.items() if entry is not Skip}
    if isinstance(value, (list, tuple, deque, set)):
        items = [captured(v, depth + 1) for v in value]
        return Skip if any(i is Skip for i in items) else items
    if _of_the_file(value) and hasattr(value, "__dict__"):  # a helper class
        return captured(vars(value), depth + 1)
    return Skip


def restored(here, saved):
    """`saved` put back into `here`, in place where tensors and containers allow it, so that aliases stay aliases."""
    if isinstance(here, Tensor) and isinstance(saved, Tensor):
        if here.shape == saved.shape and here.dtype == saved.dtype:
            return here.copy_(saved)
        return saved.clone()
    if isinstance(here, np.ndarray) and isinstance(saved, Tensor):
        return saved.cpu().numpy().copy()
    if isinstance(here, GENERATORS):
        _set_generator_state(here, saved)
        return here
    if isinstance(here, nn.Module):
        restored(vars(here), saved["own"])
        for name, module in here.named_modules():
            if name in saved["modules"]:
                restored(vars(module), saved["modules"][name])
        here.load_state_dict(saved["state"])
        return here
    if hasattr(here, "state_dict") and hasattr(here, "load_state_dict"):
        here.load_state_dict(saved["state"])
        vars(here).update(saved["own"])
        return here
    if isinstance(saved, dict) and isinstance(here, dict):
        for key, value in saved.items():
            here[key] = restored(here[key], value) if key in here else value
        return here
    if isinstance(saved, list) and isinstance(here, set):
        return set(saved)
    if isinstance(saved, list) and isinstance(here, (list, tuple, deque)):
        items = [restored(h, s) for h, s in zip(here, saved)] if len(here) == len(saved) else saved
        if isinstance(here, deque):
            return deque(items, here.maxlen)
        return type(here)(*items) if hasattr(here, "_fields") else type(here)(items)
    if isinstance(saved, dict) and hasattr(here, "__dict__"):
        restored(vars(here), saved)
        return here
    return saved


class Skip:
    """What cannot be captured: functions, configurations, foreign objects. It is as the trainer's __init__ made it."""


def tensors_of(value, name: str = "", depth: int = 0) -> dict[str, Tensor]:
    """Every tensor that hangs on a trainer, by its path: in modules, containers, optimisers."""
    if isinstance(value, Tensor):
        return {name: value}
    if isinstance(value, nn.Module) and depth:
        parts = {**dict(value.named_parameters()), **dict(value.named_buffers())}
    elif isinstance(value, torch.optim.Optimizer):
        name, parts = f"optimiser.{name}", dict(enumerate(value.state.values()))
    elif isinstance(value, dict):
        parts = value
    elif isinstance(value, (list, tuple, deque)):
        parts = dict(enumerate(value))
    else:
        parts = vars(value) if depth == 0 else {}
    return {k: t for key, part in parts.items() if depth < 6
            for k, t in tensors_of(part, f"{name}.{key}".lstrip("."), depth + 1).items()}


def _generator_state(generator):
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return list(generator.getstate())
    if isinstance(generator, np.random.Generator):
        return captured(generator.bit_generator.state)
    return captured(generator.get_state(legacy=False))


def _set_generator_state(generator, state) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state.cpu())
    elif isinstance(generator, random.Random):
        generator.setstate((state[0], tuple(state[1]), state[2]))
    else:
        plain = _as_numpy(state)
        if isinstance(generator, np.random.Generator):
            generator.bit_generator.state = plain
        else:
            generator.set_state(plain)


def _as_numpy(state: dict) -> dict:
    """A generator's captured state as NumPy takes it: arrays in its inner dicts, and nothing else changed."""
    inner = {key: {n: v.numpy() if isinstance(v, Tensor) else v for n, v in part.items()}
             for key, part in state.items() if isinstance(part, dict)}
    return state | inner


def _of_the_file(value) -> bool:
    """Whether an object's class is the variant's own."""
    return type(value).__module__.startswith("variants.")
