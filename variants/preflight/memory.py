"""How much memory one training step of a variant needs at the real sizes, found out without allocating it.

One loss + backward + after_step + revive runs at small sizes under a dispatch mode that notes every new storage and
when it is freed. Each of B, D and F is then doubled, alone, until the step takes `AFFORDABLE` bytes or the real size is
reached: how a tensor's dimensions grow along these ladders gives its size at the real B, D, F (an F×F product, a sample
of 512 rows that stops growing at F = 512, a concatenation D + F), and replaying the small run's allocations with those
sizes gives the peak.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from variants import base
from variants.kit import imperative, trainer_state

AFFORDABLE = 32 * 2**20  # bytes of a step after which a size is not doubled further
# results the host must have to go on
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim")


class Sizes(NamedTuple):
    B: int
    D: int
    F: int


class Made(NamedTuple):
    """One tensor that a step allocates."""

    op: str
    line: int | None  # of the variant's file; None in the backward pass
    shape: tuple[int, ...]
    itemsize: int


@dataclass
class Trace:
    """What one step allocated, in order."""

    made: list[Made] = field(default_factory=list)
    events: list[tuple[int, int]] = field(default_factory=list)  # (+1 allocated | −1 freed, index into made)
    gradients: set[int] = field(default_factory=set)  # indices that ended up as a parameter's gradient
    waits: set[int] = field(default_factory=set)  # lines that need a value on the host
    # name: shape, itemsize, is a parameter
    state: dict[str, tuple[tuple[int, ...], int, bool]] = field(default_factory=dict)

    def peak(self, n_bytes: list[float]) -> float:
        """Most bytes alive at once, gradients of parameters left out."""
        live = highest = 0.0
        for sign, i in self.events:
            live += sign * n_bytes[i] * (i not in self.gradients)
            highest = max(highest, live)
        return highest


def variant_line(file: str, direct: bool = False) -> int | None:
    """Line of the innermost frame inside `file`; with `direct`, only if no other code but torch's lies between."""
    frame = sys._getframe(1)
    while frame is not None:
        code_file = frame.f_code.co_filename
        if code_file == file:
            return frame.f_lineno
        if direct and code_file != __file__ and "torch" not in frame.f_globals.get("__name__", "").split("."):
            return None
        frame = frame.f_back
    return None


class Recorder(TorchDispatchMode):
    """Notes each new storage of the operations that run under it, and when it is freed."""

    def __init__(self, file: str, existing: list[torch.Tensor]):
        super().__init__()
        self.file, self.trace = file, Trace()
        # a tensor replaced in the step must not leave its address to a new one
        self.held = [t.untyped_storage() for t in existing]
        self.known = {storage._cdata for storage in self.held}
        self.alive: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        by_mask = any(isinstance(t, torch.Tensor) and t.dtype == torch.bool for t in tree_leaves(args[1:]))
        if name in WAITS or (name.startswith("index") and by_mask):
            self.trace.waits |= {variant_line(self.file, direct=True)} - {None}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.note(tensor, name)
        return out

    def note(self, tensor: torch.Tensor, op: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.alive or key in self.known:  # a view, or written in place
            return
        self.alive[key] = index = len(self.trace.made)
        self.trace.made.append(Made(op, variant_line(self.file), tuple(tensor.shape), tensor.element_size()))
        self.trace.events.append((1, index))
        weakref.finalize(storage, self.free, key).atexit = False

    def free(self, key: int) -> None:
        self.trace.events.append((-1, self.alive.pop(key)))


def trace_step(file: str, sae, batch, progress) -> Trace:
    """Run loss, backward, after_step and revive once, or a trainer's update, and record what they allocate."""
    own, optimizer = {}, None
    if isinstance(sae, imperative.Imperative):
        sae.update(batch, progress)  # its optimiser makes its moments in the first step
        own = trainer_state.tensors_of(sae.trainer)
    elif type(sae).revive is not base.SAE.revive:
        optimizer = torch.optim.Adam(sae.parameter_groups(1e-3))
        for p in sae.parameters():
            optimizer.state[p] = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
        own = {f"optimiser.{id(t)}": t for state in optimizer.state.values() for t in state.values()}
    recorder = Recorder(file, [*sae.parameters(), *sae.buffers(), *vars(batch).values(), *own.values()])
    trace = recorder.trace

    def note_gradient(parameter):  # at once: a trainer may have dropped it by the end of its update
        trace.gradients.add(recorder.alive.get(parameter.grad.untyped_storage()._cdata, -1))

    hooks = [p.register_post_accumulate_grad_hook(note_gradient) for p in sae.parameters() if p.requires_grad]
    with recorder:
        if isinstance(sae, imperative.Imperative):
            sae.update(batch, progress)
        else:
            sae.loss(batch, progress)[0].backward()
            with torch.no_grad():
                sae.after_step(batch, progress)
                if optimizer:
                    sae.revive(optimizer, batch, progress)
    for hook in hooks:
        hook.remove()
    parameters = {name for name, _ in sae.named_parameters()}
    for name, tensor in [*sae.named_parameters(), *sae.named_buffers()]:
        trace.state[name] = (tuple(tensor.shape), tensor.element_size(), name in parameters)
    counted = {id(t) for t in (*sae.parameters(), *sae.buffers())}
    for name, tensor in own.items():
        # two moments are counted for every parameter
        if id(tensor) not in counted and not name.startswith("optimiser."):
            trace.state[f"trainer.{name}"] = (tuple(tensor.shape), tensor.element_size(), False)
    return trace


def n_bytes(trace: Trace) -> list[int]:
    return [math.prod(m.shape) * m.itemsize for m in trace.made]


# ------------------------------------------------------------------------------------ from small sizes to the real ones


@dataclass(frozen=True)
class Ladder:
    """Traces with one size doubled again and again: the first, the last but one and the last."""

    two: Trace
    low: Trace
    high: Trace
    growth: float  # real size / size at `high`


def climb(measure: Callable[[Sizes], Trace], base: Trace, small: Sizes, real: Sizes, axis: int) -> Ladder:
    """Double one size until the step is no longer cheap or the next doubling would pass the real size."""
    if small[axis] == real[axis]:
        return Ladder(base, base, base, 1.0)
    rungs, size = [base], small[axis]
    while len(rungs) == 1 or (2 * size <= real[axis] and rungs[-1].peak(n_bytes(rungs[-1])) < AFFORDABLE):
        size *= 2
        rungs.append(measure(small._replace(**{"BDF"[axis]: size})))
    return Ladder(rungs[1], rungs[-2], rungs[-1], real[axis] / size)


def grown(base: int, cross: int, ladders: list[tuple[int, int, int, float]]) -> float:
    """One dimension of a tensor at the real sizes, from its length at small ones and along the ladders of B, D, F.

    Lengths grow as a product (F, B·F, F²) or as a sum (D + F); `cross`, where all sizes are doubled, tells which.
    """
    base = max(base, 1)
    product, by_product = float(base), float(base)
    total, by_sum = float(base), float(base)
    for two, low, high, growth in ladders:
        two, low, high = max(two, 1), max(low, 1), max(high, 1)
        by_product *= two / base
        by_sum += two - base
        product *= high / base * growth ** math.log2(high / low)
        total += (high - base) + (high - low) * 2 * (growth - 1)  # high − low is the growth over half of high's size
    return product if abs(by_product - cross) <= abs(by_sum - cross) else max(total, 1.0)


def shape_at_real(base: tuple, cross: tuple, ladders: list[tuple[tuple, tuple, tuple, float]]) -> tuple[float, ...]:
    """The same for a whole shape; where the number of dimensions varies, for the number of elements."""
    shapes = [base, cross, *(s for *three, _ in ladders for s in three)]
    if len({len(s) for s in shapes}) > 1:
        base, cross = (math.prod(base),), (math.prod(cross),)
        ladders = [(*((math.prod(s),) for s in three), growth) for *three, growth in ladders]
    return tuple(grown(base[i], cross[i], [(two[i], low[i], high[i], g) for two, low, high, g in ladders])
                 for i in range(len(base)))


def shapes_like(base: Trace, other: Trace) -> list[tuple[int, ...]]:
    """For each tensor of `base` the shape of its counterpart in `other`.

    Counterparts have the same operation and line, and the same rank among those; where a loop ran a different number of
    times, the largest of them stands for each.
    """
    def grouped(trace):
        groups = defaultdict(list)
        for i, m in enumerate(trace.made):
            groups[m.op, m.line].append(i)
        return groups

    theirs, found = grouped(other), [m.shape for m in base.made]
    for key, indices in grouped(base).items():
        shapes = [other.made[j].shape for j in theirs.get(key, [])]
        if len(shapes) != len(indices):
            shapes = [max(shapes, key=math.prod)] * len(indices) if shapes else [base.made[i].shape for i in indices]
        for i, shape in zip(indices, shapes):
            found[i] = shape
    return found


@dataclass(frozen=True)
class Forecast:
    """Memory at the real sizes; `largest`: bytes, shape, line of a step's tensor (None: backward) or buffer's name."""

    peak_bytes: int
    largest: tuple[int, tuple[int, ...], int | str | None]
    parameters: int
    parameter_bytes: int
    buffer_bytes: int
    waits: set[int]


def forecast(measure: Callable[[Sizes], Trace], small: Sizes, real: Sizes) -> Forecast:
    """Extrapolate the step that `measure(sizes)` traces from the small to the real sizes."""
    base = measure(small)
    ladders = [climb(measure, base, small, real, axis) for axis in range(3)]
    cross = measure(Sizes(*(n if n == r else 2 * n for n, r in zip(small, real))))

    # counterparts once per trace, then one extrapolation per tensor
    per_ladder = [([shapes_like(base, t) for t in (lad.two, lad.low, lad.high)], lad.growth) for lad in ladders]
    at_cross = shapes_like(base, cross)
    shapes = [shape_at_real(m.shape, at_cross[i], [(two[i], low[i], high[i], g) for (two, low, high), g in per_ladder])
              for i, m in enumerate(base.made)]
    sizes = [math.prod(s) * m.itemsize for s, m in zip(shapes, base.made)]

    state = {}
    for name, (shape, itemsize, is_parameter) in base.state.items():
        def of(trace, name=name, shape=shape):
            return trace.state.get(name, (shape,))[0]

        along = [(of(lad.two), of(lad.low), of(lad.high), lad.growth) for lad in ladders]
        full = shape_at_real(shape, of(cross), along)
        state[name] = (tuple(map(round, full)), itemsize, is_parameter)
    return summed(base, sizes, [tuple(map(round, s)) for s in shapes], state)


def measured(trace: Trace) -> Forecast:
    """The same figures of a step that was traced at the real sizes."""
    return summed(trace, n_bytes(trace), [m.shape for m in trace.made], trace.state)


def summed(trace: Trace, sizes: list[float], shapes: list[tuple[int, ...]], state: dict) -> Forecast:
    made = [(round(n), shape, m.line) for n, shape, m in zip(sizes, shapes, trace.made)]
    parameters = [(math.prod(shape), itemsize) for shape, itemsize, is_parameter in state.values() if is_parameter]
    buffers = [(math.prod(shape) * itemsize, shape, name) for name, (shape, itemsize, is_parameter) in state.items()
               if not is_parameter]
    return Forecast(round(trace.peak(sizes)), max(made + buffers, key=lambda t: t[0], default=(0, (), None)),
                    sum(n for n, _ in parameters), sum(n * size for n, size in parameters),
                    sum(n for n, _, _ in buffers), trace.waits)
