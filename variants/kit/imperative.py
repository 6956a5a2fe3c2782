"""The imperative form: a trainer class with `.ae` and `.update(step, activations)`, as in dictionary_learning.

The class is the one called `Trainer`, or else the only class of the file with an `update` method; of several, the one
that derives from SAETrainer, or that has `.ae`. Of the keywords it accepts it is given the sizes, steps, seed, device,
layer and model name, and the learning rate if one is set; all others are its hyper-parameters.
`update` gets x [B, D] with E‖x‖² = 1 and returns nothing, the loss, or a dict of numbers.
`.ae` has encode(x [N, D]) -> [N, F] and decode; what else hangs on it, tensors and numbers, is part of its state.
The class may declare `needs_contexts` and `attention_layers` (its update then names an argument `batch`) and define
`report` and `feature_groups` as variants/base.py describes them.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from variants import base
from variants.kit.copying import duplicate
from variants.kit.trainer_state import MODULE_INTERNALS, PLAIN_NUMBERS
from variants.kit.trainers import SUPPLIED, keywords

MOST_ITEMS = 64  # tensors in a list or dict on the ae that are taken for its state
GLANCE = 128  # tokens of each batch encoded once more, to see which features fire


def adapted(trainer_class: type) -> type[Imperative]:
    """The SAE class that runs a trainer class."""
    may_declare = ("needs_contexts", "attention_layers", "attention_threshold")
    declared = {name: getattr(trainer_class, name) for name in may_declare if hasattr(trainer_class, name)}
    return type("SAE", (Imperative,), declared | dict(trainer_class=trainer_class, __module__=trainer_class.__module__))


class Imperative(base.SAE):
    """A trainer's `.ae` under the contract of base.SAE: any leading dimensions, one tensor of features, a decoder."""

    trainer_class: type
    attention_threshold = None
    schedules = ()  # k_start of a trainer may be anything

    def __init__(self, d_in: int, d_sae: int, setting: dict, **hyper):
        nn.Module.__init__(self)
        self.d_in, self.d_sae, self.setting = d_in, d_sae, setting
        trainer = self.trainer_class(**keywords(self.trainer_class, d_in, d_sae, setting, hyper))
        self.__dict__["trainer"] = trainer  # past nn.Module: some trainers are modules themselves
        if not isinstance(getattr(trainer, "ae", None), nn.Module):
            near = [n for n, value in vars(trainer).items() if isinstance(value, nn.Module)]
            has = f"; it has {', '.join(near)}" if near else ""
            wanted = f"self.ae = self.{near[0]}" if near else "self.ae"
            raise AttributeError(f"{type(trainer).__name__} has no module called ae{has}\n"
                                 f"evals use trainer.ae.encode and trainer.ae.decode: set {wanted}")
        self.ae = trainer.ae
        for method, given in (("encode", "x"), ("decode", "features")):
            check_called(self.ae, method, given)
        self.__dict__["_numbers_made"] = dict(_plain(self.ae, PLAIN_NUMBERS))
        self.__dict__["returned"] = None  # what encode returned besides one tensor, in words
        width = self._width()
        self.register_buffer("tokens_since_fired", torch.zeros(width, dtype=torch.int64, device=setting["device"]))
        self._fired_F = None
        self._takes_batch = takes_batch(trainer.update)
        self._names: list[str] | None = None  # of the numbers update returned first; later steps give the same ones
        self.__dict__["_last"] = {}

    def __deepcopy__(self, memo):
        """A copy to look at: its own ae, the same trainer."""
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        memo[id(self.trainer)] = self.trainer
        for name, value in self.__dict__.items():
            twin.__dict__[name] = copy.deepcopy(value, memo)
        return twin

    @torch.no_grad()
    def _width(self) -> int:
        """Number of features: of a copy of the ae, in eval mode, on rows like a batch's: looking changes nothing."""
        rows_ND = torch.randn(GLANCE, self.d_in, generator=torch.Generator().manual_seed(0))
        x_ND = nn.functional.normalize(rows_ND, dim=1).to(self.setting["device"])
        probe = duplicate(self.ae, but=(self.trainer,))
        devices = [x_ND.device] if x_ND.is_cuda else []
        with torch.random.fork_rng(devices), looking(probe):
            return self._features(probe, x_ND).shape[-1]

    def _features(self, ae: nn.Module, x_ND: Tensor) -> Tensor:
        """What `ae.encode` returns; of several tensors the first that has the features' shape."""
        found = ae.encode(x_ND.to(dtype_of(ae)))
        if isinstance(found, Tensor):
            return found
        if isinstance(found, (tuple, list)):
            parts = list(found)
        else:
            parts = list((found if isinstance(found, dict) else getattr(found, "__dict__", {})).values())
        wide = [part for part in parts if isinstance(part, Tensor) and part.ndim == 2 and len(part) == len(x_ND)]
        counters = self._buffers.get("tokens_since_fired")
        width = self.d_sae if counters is None else len(counters)
        fitting = [part for part in wide if part.shape[1] == width]
        fitting = fitting or [part for part in wide if part.shape[1] != self.d_in]
        what = f"{len(parts)} values" if parts else f"a {type(found).__name__}"
        if not fitting:
            raise TypeError(f"{place_of(ae.encode)}: ae.encode returned {what}: evals need one tensor of "
                            "features [tokens, number of features]\nreturn the features alone; what update needs "
                            "besides, give behind a keyword: encode(x, return_gate=False)")
        shape = f"[tokens, {fitting[0].shape[1]}]"
        self.__dict__["returned"] = f"{what}, of which the first of shape {shape} is taken as the features"
        return fitting[0]

    def encode(self, x: Tensor) -> Tensor:
        """Features (..., F) of x (..., D); the trainer's ae gets [N, D]."""
        z = self._features(self.ae, x.reshape(-1, x.shape[-1]))
        return z.reshape(*x.shape[:-1], z.shape[-1])

    def decode(self, z: Tensor) -> Tensor:
        """Reconstruction (..., D) of features (..., F)."""
        return self.ae.decode(z.reshape(-1, z.shape[-1]).to(dtype_of(self.ae))).reshape(*z.shape[:-1], -1)

    @property
    def decoder(self) -> Tensor:
        """[F, D]: the ae's own matrix where four of its rows agree with decode, else decode applied to each feature."""
        with looking(self.ae):
            return self._decoder()

    @torch.no_grad()
    def _decoder(self) -> Tensor:
        F, device = len(self.tokens_since_fired), self.tokens_since_fired.device
        rows = torch.linspace(0, F - 1, 4, device=device).long()

        def decoded(index: Tensor) -> Tensor:
            one_NF = torch.zeros(len(index), F, device=device).scatter(1, index[:, None], 1.0)
            return self.decode(one_NF) - self.decode(torch.zeros(1, F, device=device))

        some = decoded(rows)
        linear, near = getattr(getattr(self.ae, "decoder", None), "weight", None), 1e-4 * float(some.abs().max())
        for W in (getattr(self.ae, "W_dec", None), linear):
            for W_FD in (W, W.T) if isinstance(W, Tensor) and W.ndim == 2 else ():
                if W_FD.shape == (F, some.shape[1]) and torch.allclose(W_FD[rows].to(some), some, 1e-3, near):
                    return W_FD
        return torch.cat([decoded(part) for part in torch.arange(F, device=device).split(512)])

    def update(self, batch: base.Batch, progress: base.Progress) -> tuple[Tensor, dict[str, Tensor]]:
        """The trainer's own step: its loss and numbers; without a loss ‖x − x_hat‖² of some tokens after the step."""
        named = {"batch": batch} if self._takes_batch else {}
        out = self.trainer.update(progress.step, batch.x, **named)
        if self.trainer.ae is not self.ae:  # replaced by a wider one, say
            self.ae = self.trainer.ae
        x_ND = batch.x[:GLANCE]
        with torch.no_grad(), looking(self.ae):
            z_NF = self.encode(x_ND)
            if z_NF.shape[-1] != len(self.tokens_since_fired):
                self.tokens_since_fired = self.tokens_since_fired.new_zeros(z_NF.shape[-1])
            self.note_fired(z_NF)
            terms = _returned(out) or {"reconstruction": base.reconstruction_loss(x_ND - self.decode(z_NF))}
        self.count_step(len(batch.x))
        terms = {k: torch.as_tensor(v).detach().reshape(()).to(batch.x.device, torch.float32) for k, v in terms.items()}
        loss = terms.pop("loss", None)
        loss = next(iter(terms.values())) if loss is None else loss
        if self._names is None:
            self._names = list(terms)
        # the log has the columns of the first step: what a later one leaves out stays as it was
        self.__dict__["_last"] = {name: terms.get(name, self._last.get(name, loss)) for name in self._names}
        return loss, dict(self._last)

    @property
    def default_lr(self) -> float:
        """The learning rate the trainer chose."""
        return next((float(lr) for lr in (getattr(self.trainer, n, None) for n in SUPPLIED["lr"]) if lr is not None),
                    base.SAE.default_lr)

    def report(self, context: dict):
        """What the trainer reports, and the numbers it names for logging."""
        own, logged = (getattr(self.trainer, name, None) for name in ("report", "get_logging_parameters"))
        numbers, files = own(context) if callable(own) else ({}, {})
        logged = {name: float(value) for name, value in _numbers(logged()).items()} if callable(logged) else {}
        return {**logged, **numbers}, files

    def feature_groups(self):
        own = getattr(self.trainer, "feature_groups", None)
        return own() if callable(own) else None

    # -- what hangs on the ae besides parameters and buffers: masks, running statistics, thresholds

    def _plain_state(self) -> dict[str, Tensor]:
        """The ae's plain tensors, and the plain numbers that training has changed, by their names in a state dict."""
        numbers = {name: torch.tensor(value, dtype=_dtype(value)) for name, value in _plain(self.ae, PLAIN_NUMBERS)
                   if self._numbers_made.get(name) != value}
        return {name: value.detach() for name, value in _plain(self.ae, Tensor)} | numbers

    def state_dict(self, *args, prefix: str = "", **kwargs):
        state = super().state_dict(*args, prefix=prefix, **kwargs)
        for name, tensor in self._plain_state().items():
            state[prefix + name] = tensor
        return state

    def load_state_dict(self, state, strict: bool = True, assign: bool = False):
        formal = nn.Module.state_dict(self).keys()
        own = {name: tensor for name, tensor in state.items() if name not in formal
               and self.holder_of(name) is not None}
        result = super().load_state_dict({name: t for name, t in state.items() if name not in own}, strict, assign)
        for name in sorted(own, key=lambda name: (len(name), name)):  # a list's second entry before its tenth
            _put(self.holder_of(name), *PLACE.match(name).group(2, 3), own[name])
        return result

    def holder_of(self, name: str) -> nn.Module | None:
        """The module of the ae on which a plain tensor or number of that name hangs; None if it is no such name."""
        place = PLACE.match(name)
        return dict(self.named_modules()).get(place[1]) if place else None

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        for name, value in list(_plain(self.ae, Tensor)):
            _put(self.holder_of(name), *PLACE.match(name).group(2, 3), fn(value.detach()))
        return self


def check_called(ae: nn.Module, method: str, given: str) -> None:
    """The ae's encode and decode can be called as the evals call them. AttributeError, TypeError."""
    function = getattr(ae, method, None)
    if not callable(function):
        raise AttributeError(f"{type(ae).__name__} has no method {method}\nevals need ae.encode(x) -> features "
                             "[tokens, number of features] and ae.decode(features) -> x_hat")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # built in, or made by a compiler: what it takes is seen when it is called
        return
    try:
        signature.bind(None)
    except TypeError as error:
        raise TypeError(f"{place_of(function)}: ae.{method}{signature} is called as ae.{method}({given}): {error}\n"
                        "give its other arguments a default") from None


def place_of(function) -> str:
    """`file.py:line` of a function's own definition, behind its decorators."""
    code = getattr(inspect.unwrap(getattr(function, "__func__", function)), "__code__", None)
    return f"{Path(code.co_filename).name}:{code.co_firstlineno}" if code else "ae"


def dtype_of(ae: nn.Module) -> torch.dtype:
    """The dtype in which an ae computes: of its first parameter that is no counter."""
    return next((p.dtype for p in ae.parameters() if p.is_floating_point()), torch.float32)


def takes_batch(update) -> bool:
    """Whether a trainer's update asks for the whole batch, by an argument's name behind step and activations."""
    return "batch" in list(inspect.signature(update).parameters)[2:]


@contextmanager
def looking(ae: nn.Module):
    """The ae in eval mode within; each of its modules gets its own mode back."""
    modes = {module: module.training for module in ae.modules()}
    ae.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _dtype(number) -> torch.dtype:
    """The one that holds a Python number as it is."""
    return {bool: torch.bool, int: torch.int64}.get(type(number), torch.float64)


# a plain tensor's name in a state dict: the module, its attribute, and in brackets the entry of a list or dict there
PLACE = re.compile(r"(ae(?:\.[^\[]+)?)\.([^.\[]+)(?:\[(.*)\])?$", re.S)


def _plain(ae: nn.Module, kind) -> Iterator[tuple[str, object]]:
    """(name, value) of what is no parameter or buffer and of that kind: attributes, and tensors in lists and dicts.

    A list that grows with every step is a history, and no state: one of more than MOST_ITEMS is left out.
    """
    for prefix, module in ae.named_modules(prefix="ae"):
        for key, value in list(vars(module).items()):
            if key in MODULE_INTERNALS:
                continue
            if isinstance(value, kind):
                yield f"{prefix}.{key}", value
            if kind is not Tensor or not isinstance(value, (dict, list)) or len(value) > MOST_ITEMS:
                continue
            for item, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
                if isinstance(inner, Tensor) and isinstance(item, (str, int)):
                    yield f"{prefix}.{key}[{item}]", inner


def _put(module: nn.Module, attribute: str, item: str | None, tensor: Tensor) -> None:
    """Put a plain tensor back where it hung; a number where a number stands."""
    there = getattr(module, attribute, None)
    if item is None:
        number = tensor.ndim == 0 and isinstance(there, PLAIN_NUMBERS)
        setattr(module, attribute, tensor.item() if number else tensor.clone())
    elif isinstance(there, dict):
        by_number = item.isdigit() and all(isinstance(key, int) for key in there)
        there[int(item) if by_number else item] = tensor.clone()
    else:
        entries = there if isinstance(there, list) else []
        entries[int(item):int(item) + 1] = [tensor.clone()]
        setattr(module, attribute, entries)


def _returned(out) -> dict:
    """The numbers that update returned: of a tuple its first number as the loss, and those of the dicts in it."""
    if isinstance(out, dict):
        return _numbers(out)
    if not isinstance(out, tuple):
        return _numbers({"loss": out})
    numbers = [part for part in out if _numbers({"": part})]
    named = {key: value for part in out if isinstance(part, dict) for key, value in _numbers(part).items()}
    return {"loss": numbers[0], **named} if numbers else named


def _numbers(given: dict) -> dict:
    """Those entries that are single numbers."""
    return {str(k): v for k, v in given.items()
            if isinstance(v, (bool, int, float, np.number)) or (isinstance(v, Tensor) and v.numel() == 1)}
