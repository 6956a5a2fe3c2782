"""Several processes that train together under torchrun: which one this is, and what they tell each other.

torch.distributed does the work, NCCL between GPUs, gloo between CPUs and for what the hosts agree on. In one process
every function here is the identity.
Ranks *train together* (`together`) where a variant declares `data_parallel`: each takes an equal share of every batch,
gradients are averaged, and what is not a mean over tokens goes through `mean`, `smallest`, `any_of`.
Else the first rank trains alone on whole batches, and the others only do their part of the language model's passes.

Shapes: N tokens of a block, n those of this rank, W ranks, and as in base.py.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

_number, _count = 0, 1
_together = False  # whether what happens now happens on equal shares of one batch on all ranks


def join(device: str) -> None:
    """Take part in the group that torchrun describes in the environment, if it is of more than one process."""
    global _number, _count
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # a lost process ends the others at once, by torchrun; the time is what a rank may need for a preflight with
    # downloads, or for evals
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=timedelta(hours=24))
    _number, _count = dist.get_rank(), dist.get_world_size()


def through(sae) -> bool:
    """When all ranks are through training: whether the trained SAE is elsewhere, spread over them or on the first."""
    idle = _number > 0 and not _together
    elsewhere = is_sharded(sae) or idle
    train_together(False)
    meet()
    return elsewhere


def meet() -> None:
    """Go on when all ranks have come here."""
    if count() > 1:
        dist.all_reduce(torch.zeros(1))  # on the hosts


def dealt(items: list) -> Iterator:
    """Each rank gets its share of the items; then, when all are through, the first those of the others.

    Some may have failed there. The ranks part (`leave`) before that.
    """
    W = count()
    yield from items[number() :: W]
    if W > 1:
        meet()
        if leave():
            yield from (item for i, item in enumerate(items) if i % W)


def leave() -> bool:
    """After what is done together: whether this rank is the first, which goes on alone. Others keep their number."""
    global _count, _together
    _count, _together = 1, False
    if dist.is_initialized():
        dist.destroy_process_group()
    return _number == 0


def end(status: int) -> None:
    """End the process with that exit status; of several ranks at once: a group's threads may abort one that unwinds."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def number() -> int:
    """This rank; 0 in one process."""
    return _number


def count() -> int:
    """How many ranks there are; 1 in one process."""
    return _count


def train_together(yes: bool) -> bool:
    """Say once, on every rank, whether they train together from now on; whether that means more than one."""
    global _together
    _together = yes and count() > 1
    return _together


def sharing() -> int:
    """Among how many ranks each batch is shared."""
    return count() if _together else 1


# ------------------------------------------------------------------------------------------------ what hosts agree on


def agreed(find: Callable):
    """What `find` returns on the first rank, on all of them."""
    if count() == 1:
        return find()
    box = [find() if number() == 0 else None]
    dist.broadcast_object_list(box, device=torch.device("cpu"))
    return box[0]


def any_host(flag: bool) -> bool:
    """Whether the flag is set on one of the ranks that train together."""
    if not _together:
        return flag
    found = torch.tensor([float(flag)])
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found)


def total(value: float) -> float:
    """Sum of a number over the ranks that train together, in fp64."""
    if not _together:
        return value
    found = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(found)
    return float(found)


@contextmanager
def first_before_others() -> Iterator[None]:
    """The first rank goes through the body before the others begin it: it may download what all of them read."""
    if number():
        agreed(lambda: None)
    yield
    if not number():
        agreed(lambda: None)


# ----------------------------------------------------------------------------------------- inside a step: nothing waits


def mean(value: Tensor) -> Tensor:
    """Mean over ranks. The gradient is that of this rank's own value: averaged over ranks, it is the mean's."""
    if not _together:
        return value
    return value + (_reduced(value, dist.ReduceOp.SUM) / count() - value.detach())


def smallest(value: Tensor) -> Tensor:
    return _reduced(value, dist.ReduceOp.MIN) if _together else value


def any_of(mask: Tensor) -> Tensor:
    return _reduced(mask.to(torch.uint8), dist.ReduceOp.MAX).bool() if _together else mask


def _reduced(value: Tensor, how) -> Tensor:
    value = value.detach().clone()
    dist.all_reduce(value, how)
    return value


def gathered(value: Tensor) -> Tensor:
    """The ranks' tensors [n, ...], of one shape, behind one another: [W·n, ...]."""
    parts = [torch.empty_like(value) for _ in range(count())]
    dist.all_gather(parts, value.contiguous())
    return torch.cat(parts)


def average_gradients(sae: torch.nn.Module) -> None:
    """Mean over ranks of the gradients; those of a sharded SAE have been averaged by FSDP."""
    if not _together or is_sharded(sae):
        return
    for parameter in sae.parameters():
        if parameter.requires_grad:
            if parameter.grad is None:  # here, but maybe not on another rank
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad = parameter.grad.contiguous()  # not where it was made for a transposed parameter
            dist.all_reduce(parameter.grad)
            parameter.grad /= count()


# ------------------------------------------------------------------------------------------------ a block's tokens


def shares(rows_RT: Tensor, index_N: Tensor) -> tuple[slice, slice, Tensor]:
    """This rank's share of a block's rows, and of its tokens at flat positions index_N; where each rank's begins.

    The last, [W + 1], counts tokens and ends with all of them.
    """
    rows = [-(-len(rows_RT) * rank // count()) for rank in range(count() + 1)]  # the first rank has some, if any
    starts_W = torch.searchsorted(index_N, torch.tensor(rows) * rows_RT.shape[1])
    mine = number()
    return slice(*rows[mine:mine + 2]), slice(*starts_W[mine:mine + 2].tolist()), starts_W


def in_order(x_nD: Tensor, starts: list[int], order_N: Tensor, batch: int) -> Tensor:
    """This rank's share of every batch of a shuffled block, [steps·batch/W, D], in the order of the steps.

    `x_nD` holds the tokens starts[rank]..starts[rank + 1] of the block; batch i is order_N[i·batch:(i + 1)·batch]
    (host, int64) as in one process, rank r's share its r-th part. One all-to-all; indices are worked out on the host.
    """
    W, r = count(), number()
    wanted_W = order_N.view(-1, W, batch // W).unbind(1)  # [steps, batch/W] for each rank
    edges = torch.tensor(starts)
    send, taken = [], []
    for q in range(W):
        index = wanted_W[q].flatten()
        mine = index[(index >= starts[r]) & (index < starts[r + 1])] - starts[r]
        send.append(len(mine))
        taken.append(mine)
    index = wanted_W[r].flatten()
    owner = torch.searchsorted(edges, index, right=True) - 1
    came = torch.bincount(owner, minlength=W).tolist()
    given = x_nD.index_select(0, torch.cat(taken).to(x_nD.device))
    got = x_nD.new_empty(len(index), *x_nD.shape[1:])
    dist.all_to_all_single(got, given, came, send)
    del given
    out = torch.empty_like(got)
    out[owner.argsort(stable=True).to(got.device)] = got
    return out


def first_rows(x_nD: Tensor, start: int, wanted: int) -> Tensor:
    """The first `wanted` tokens of a block of which this rank holds x_nD from token `start` on."""
    if not _together:
        return x_nD[:wanted]
    out = x_nD.new_zeros(min(wanted, int(total(len(x_nD)))), x_nD.shape[1])
    mine = x_nD[:max(0, len(out) - start)]
    out[start:start + len(mine)] = mine
    dist.all_reduce(out)
    return out


def to_first(block: dict[str, Tensor], row: int, token: int, context: int) -> dict[str, Tensor]:
    """On the first rank the whole block of which each rank has a part from this row and token on; else nothing."""
    if count() == 1:
        return block
    shift = dict(place_N=row * context, pair_query_P=token, pair_key_P=token)
    moved = {name: shift.get(name.rpartition("/")[2]) for name in block}
    block = {name: tensor if moved[name] is None else tensor + moved[name] for name, tensor in block.items()}
    shapes = [None] * count()
    dist.all_gather_object(shapes, {name: t.shape for name, t in block.items()})
    out = {}
    for name, mine in block.items():
        if mine.dim() == 0:  # the share of the BOS positions: the first rank's is as good
            out[name] = mine
            continue
        if number():
            if mine.numel():
                dist.send(mine.contiguous(), 0)
            continue
        sent = [shape.get(name, torch.Size([0])) for shape in shapes]
        parts = {rank: mine.new_empty(shape) for rank, shape in enumerate(sent) if rank and shape.numel()}
        for rank, part in parts.items():
            dist.recv(part, rank)
        out[name] = torch.cat([mine, *parts.values()])
    return {} if number() else out


# ----------------------------------------------------------------------------------------- an SAE too wide for one rank


def shard(sae: torch.nn.Module) -> None:
    """Spread parameters, gradients and optimiser state over the ranks with FSDP2, by features where possible.

    During a step each rank holds the whole parameters and gradients for a while.
    An optimiser must be made anew after it.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    from torch.distributed.tensor import Shard

    def by_features(parameter: Tensor) -> Shard:
        return Shard(next((i for i, size in enumerate(parameter.shape) if size == sae.d_sae and size % count() == 0),
                          0))

    kind = next(sae.parameters()).device.type
    fully_shard(sae, mesh=init_device_mesh(kind, (count(),)), reshard_after_forward=False,
                shard_placement_fn=by_features)
    for method in ("loss", "encode", "decode"):
        register_fsdp_forward_method(sae, method)


def is_sharded(sae: torch.nn.Module) -> bool:
    return hasattr(sae, "reshard")


def whole(state):
    """A state dict with every sharded tensor put together, on the first rank's host; the rest stays as it is."""
    if isinstance(state, dict):
        return {key: whole(value) for key, value in state.items()}
    if isinstance(state, list):
        return [whole(value) for value in state]
    if hasattr(state, "full_tensor"):
        full = state.full_tensor()
        return full.cpu() if number() == 0 else None
    return state


def parted(state, like: Tensor):
    """A tensor of an optimiser's saved state, whole, as the parameter `like` has its own: sharded as that is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor) or not isinstance(state, Tensor) or state.shape != like.shape:
        return state
    return distribute_tensor(state.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def load_optimizer(optimizer, state: dict) -> None:
    """`optimizer.load_state_dict` of a whole state, also for a sharded SAE."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        optimizer.load_state_dict(state)
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = (state | dict(state={i: {k: parted(v, parameters[i]) for k, v in s.items()}
                                 for i, s in state["state"].items()}))
    optimizer.load_state_dict(state)
