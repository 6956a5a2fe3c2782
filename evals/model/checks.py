"""What can be wrong with a language model that was loaded: its weights, its pass, and residuals that some tokens rule.

`lm` is an evals.model.language_model.LanguageModel, which imports this module.
Shapes: B rows, T context length, D = d_model, N tokens, V vocabulary.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Iterable

import torch
from torch import Tensor

from evals.model.architecture import ONE_STREAM, blocks
from evals.model.folders import SINGLE, some
from evals.storage import network

DAMAGED = "its file is damaged, or was when it was written: copy it again, or save the model again"
CHECK_WEIGHTS = "check its weights and config.json, or save the model again"
BUFFERS = re.compile(r"inv_freq|(attn|attention)\.(masked_)?bias$|position_ids|rotary")  # of old files: not learnt
# mean over tokens of |compiled - plain| / |plain| at most; on CPU SmolLM2-135M had 9e-7 in fp32 and .02 in bf16
# (plain to fp32: .02)
ROUNDING = {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.05}
# in a residual stream: real ones reach 1e5, and squares of 3e14 overflow when those of 1e6 tokens × 4096 are summed
# in fp32
LARGEST = 1e14
OUTLIER = 10.0  # times the median distance from the centre
CENTRE_FROM = 2**14  # tokens, at most
PART = 2**13  # tokens that are in fp64 at once
ALONE = 4096  # tokens after the first that has NaN, among which its cause is looked for: more than a row

# ------------------------------------------------------------------------------------------------ weights


def unreadable(error: Exception, name: str) -> ValueError:
    """What to say of weights that transformers cannot load."""
    if any(isinstance(e, pickle.UnpicklingError) for e in network.chain(error)):
        return ValueError(f"{name}: {SINGLE[1]} holds more than weights, or is damaged, "
                          "and what may run code is not read\n"
                          "save the model again as safetensors: save_pretrained does")
    return ValueError(f"{name}: transformers cannot load its weights: {type(error).__name__}: "
                      f"{network.first_line(error)}\n{DAMAGED}")


def check_complete(about, config, name: str) -> None:
    """ValueError if weights are missing, of another shape, or of blocks that the configuration does not have.

    transformers fills the first up with random numbers, leaves the last out, and goes on.
    """
    def keys(kind: str) -> Iterable:
        return about.get(kind, ()) if isinstance(about, dict) else getattr(about, kind, ())

    strange = sorted(str(key) for key in keys("unexpected_keys") if not BUFFERS.search(str(key)))
    lacking = sorted(map(str, keys("missing_keys")))
    if lacking:
        instead = f", and has others that it knows nothing of: {some(strange)}" if strange else ""
        raise ValueError(f"{name} lacks weights that its configuration asks for: {some(lacking)}{instead}\n"
                         "check config.json against the weights, or save the model again")
    others = sorted(keys("mismatched_keys"), key=str)
    if others:
        key, there, asked = others[0]
        raise ValueError(f"{name} has weights of another shape than its configuration asks for: "
                         f"{some([str(o[0]) for o in others])}, {list(there)} instead of {list(asked)}\n"
                         "check config.json against the weights, or save the model again")
    n_layers = config.get_text_config().num_hidden_layers
    blocks_there = {int(n) for key in keys("unexpected_keys") for n in re.findall(r"\.(\d+)\.", str(key))[:1]}
    beyond = [n for n in blocks_there if n >= n_layers]
    if beyond:
        raise ValueError(f"{name} has weights of block {min(beyond)}, and its configuration says {n_layers} blocks\n"
                         "check num_hidden_layers in config.json, or save the model again")
    unused = [key for key in strange if re.search(r"\.\d+\.", key)]
    if unused:  # a bias left out is another model
        raise ValueError(f"{name} has weights in its blocks that its configuration makes no use of: {some(unused)}\n"
                         "check model_type and the biases in config.json, or save the model again")
    if strange:
        print(f"language model: note: {name} has weights that are not used: {some(strange)}", flush=True)


@torch.no_grad()
def check_values(hf: torch.nn.Module, tokenizer, name: str) -> None:
    """ValueError for weights that are NaN or infinite, and for a block, or embeddings, of zeros alone.

    One pass over the weights. Other matrices of zeros are said, since some are meant.
    """
    embedding, zero = hf.get_input_embeddings().weight, {}
    for key, weight in hf.named_parameters():
        if not weight.numel() or not weight.is_floating_point() or weight.element_size() < 2:  # fp8 cannot be asked
            continue
        low, high = (float(value) for value in weight.aminmax())  # NaN, if one of them is
        if not (math.isfinite(low) and math.isfinite(high)):
            bad = ~weight.isfinite()
            row = int(bad.nonzero()[0, 0])
            token = f", the token {row} ({tokenizer.decode([row])!r})" if weight is embedding else ""
            raise ValueError(f"{name}: {key} holds NaN or infinite values in "
                             f"{str(weight.dtype).removeprefix('torch.')}: {int(bad.sum()):,} of its "
                             f"{weight.numel():,}, first in row {row}{token}\n{DAMAGED}")
        if low == high == 0 and weight.dim() > 1:
            zero[key] = weight
    for number, block in enumerate(blocks(hf)):
        matrices = {id(weight) for weight in block.parameters() if weight.dim() > 1}
        if matrices and matrices <= set(map(id, zero.values())):
            raise ValueError(f"{name}: all matrices of block {number} are 0\n{DAMAGED}")
    if any(weight is embedding for weight in zero.values()):
        raise ValueError(f"{name}: its embeddings are all 0\n{DAMAGED}")
    if zero:
        print(f"language model: note: {name} has matrices of zeros alone: {some(sorted(zero))}", flush=True)


@torch.no_grad()
def assert_soft_capping(hf) -> None:
    """RuntimeError if a tiny cap changes nothing: Gemma-2 caps its attention logits, and fused kernels drop that."""
    block = blocks(hf)[0].self_attn
    tokens = torch.arange(16, device=hf.device)[None] % hf.config.get_text_config().vocab_size
    given, outputs = block.attn_logit_softcapping, []
    for cap in (given, 1e-3):
        block.attn_logit_softcapping = cap
        outputs.append(hf(tokens, use_cache=False).logits)
    block.attn_logit_softcapping = given
    if torch.equal(*outputs):
        raise RuntimeError("this attention implementation drops Gemma-2's soft-capping of attention logits\n"
                           "use a transformers version whose eager attention keeps it")


# ------------------------------------------------------------------------------------------------ a pass


def two_rows(lm) -> Tensor:
    """Two short rows of random tokens, always the same [2, 16]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(lm.vocab_size, (2, 16), generator=generator).to(lm.device)


@torch.no_grad()
def check_pass(lm) -> None:
    """RuntimeError, with block and reason, where two short rows give no numbers, too large ones, or pass unchanged."""
    tokens_BT = two_rows(lm)
    what = f"{lm.name} ({lm.hf.config.model_type})"
    cause = first_not_finite(lm, tokens_BT)
    if cause:
        raise RuntimeError(f"{what} gives NaN or infinite values {cause}\n{CHECK_WEIGHTS}")
    for number, (x_BTD, out_BTD) in enumerate(_around_blocks(lm, tokens_BT)):
        given, most = (float(h_BTD.abs().max()) for h_BTD in (x_BTD, out_BTD))
        if max(given, most) > LARGEST:
            place = f"before block {number}, in its embeddings"
            if most > given:
                place = f"after block {number}, {_of_weights(lm, number)}"
            raise RuntimeError(f"{what} gives values up to {max(given, most):.2g} {place}: their squares overflow\n"
                               f"{CHECK_WEIGHTS}")
        if torch.equal(x_BTD, out_BTD):
            raise RuntimeError(f"{what}: block {number} changes nothing: what it adds is 0, or is lost in rounding "
                               f"beside its input's values of up to {most:.2g}\n{CHECK_WEIGHTS}")


def first_not_finite(lm, tokens_BT: Tensor) -> str | None:
    """Where in the pass of these rows NaN or infinity first comes up, and why, in words; None where all is finite."""
    dtype = str(lm.dtype).removeprefix("torch.")
    for number, (x_BTD, out_BTD) in enumerate(_around_blocks(lm, tokens_BT)):
        if not x_BTD.isfinite().all():
            return f"before block 0, in its embeddings, in {dtype}"
        if not out_BTD.isfinite().all():
            weights = lm.blocks[number].named_parameters()
            broken = next((key for key, weight in weights if not weight.isfinite().all()), None)
            why = f"its {broken} holds such" if broken else f"it overflows {_of_weights(lm, number)}"
            return f"after block {number} in {dtype}: {why}, and is given values up to {float(x_BTD.abs().max()):.2g}"
    logits_BTV = lm.hf(input_ids=tokens_BT, use_cache=False).logits
    return None if logits_BTV.isfinite().all() else f"as logits in {dtype}, though all blocks give finite ones"


def _of_weights(lm, number: int) -> str:
    """The largest weight of a block, which tells one that was made too large from one that was trained so."""
    most = {key: float(weight.abs().max()) for key, weight in lm.blocks[number].named_parameters() if weight.numel()}
    key = max(most, key=most.get)
    return f"with weights up to {most[key]:.2g} ({key})"


@torch.no_grad()
def _around_blocks(lm, tokens_BT: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(residual stream that goes into, that comes out of) each block, from one plain pass."""
    into, out = [], []

    def before(module, args, kwargs):
        first = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        into.append(first.clone())  # a block may work in place

    def after(module, args, output):
        out.append(output if isinstance(output, Tensor) else output[0])

    handles = [block.register_forward_pre_hook(before, with_kwargs=True) for block in lm.blocks]
    handles += [block.register_forward_hook(after) for block in lm.blocks]
    try:
        lm.backbone(input_ids=tokens_BT, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return list(zip(into, out))


@torch.no_grad()
def trial(lm, layers: list[int]) -> None:
    """Two short rows through all that a run will ask of the plain model, held against one whole pass of it.

    RuntimeError, with the figure, where the pass cannot be cut at one of the `layers` or put together again from there:
    then every result would be another model's.
    """
    tokens_BT = two_rows(lm)
    kind = f"{lm.name} ({lm.hf.config.model_type})"

    def refuse(what: str):
        raise RuntimeError(f"{kind} {what}\n{ONE_STREAM}")

    logits_BTV = lm.hf(input_ids=tokens_BT, use_cache=False).logits
    other_BT = torch.cat([tokens_BT[:, :-1], (tokens_BT[:, -1:] + 1) % lm.vocab_size], 1)
    for layer in layers:
        try:
            x_BTD = lm.residuals(tokens_BT, [layer])[layer]
            if x_BTD.shape != (2, 16, lm.d_model):
                refuse(f"has blocks that give {list(x_BTD.shape)}, not [rows, tokens, {lm.d_model}]")
            if not (x_BTD.isfinite().all() and logits_BTV.isfinite().all()):
                cause = first_not_finite(lm, tokens_BT) or f"after block {layer}"
                raise RuntimeError(f"{kind} gives NaN or infinite values {cause}\n{CHECK_WEIGHTS}")
            change_BTD = lm.residuals(other_BT, [layer])[layer] - x_BTD
            later = float(change_BTD[:, :-1].float().norm() / x_BTD.float().norm())
            if not later <= ROUNDING[lm.dtype]:
                refuse(f"is not causal: another last token changes what earlier ones get from block {layer} by "
                       f"{later:.2g} of their norm")
            ours_BTV = lm.unembed(lm.finish_in(lm.hf, x_BTD, layer))
            ablated = lm.unembed(lm.finish_in(lm.hf, torch.zeros_like(x_BTD), layer))
        except (AttributeError, TypeError, ValueError, IndexError, KeyError) as error:
            refuse(f"cannot be cut after block {layer}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        error = float((ours_BTV.float() - logits_BTV.float()).norm() / logits_BTV.float().norm())
        if not error <= ROUNDING[lm.dtype]:
            refuse(f"gives other logits when its pass is cut after block {layer} and finished from there: they differ "
                   f"by {error:.2g} of their norm, more than {ROUNDING[lm.dtype]:g}")
        if not ablated.isfinite().all():
            refuse(f"gives NaN or infinite logits when the residual stream after block {layer} is ablated")


# ------------------------------------------------------------------------------------------------ residuals


@torch.no_grad()
def not_finite(lm, layer: int, x_ND: Tensor, tokens_N: Tensor) -> ValueError:
    """What to say of residuals of which some are NaN or infinite: the token that makes them so, and where in the model.

    x_ND: residuals after block `layer`, in the order of the text, for tokens_N. The first that is not finite may be
    innocent: within a row a NaN goes to earlier tokens too (attention weighs it by 0). So each token near it is passed
    alone, then more and more of them.
    """
    first = 0
    for part in x_ND.split(2**14):
        bad = (~part.isfinite().all(-1)).nonzero()
        if len(bad):
            first += int(bad[0])
            break
        first += len(part)
    near = [lm.bos, *tokens_N[first:first + ALONE].tolist()]

    def fails(rows: list[list[int]]) -> list[bool]:
        x_BTD = lm.residuals(torch.tensor(rows, device=lm.device), [layer])[layer]
        return (~x_BTD.isfinite().flatten(1).all(1)).tolist()

    distinct = list(dict.fromkeys(near[1:]))
    for start in range(0, len(distinct), 64):
        rows = [[lm.bos, token] for token in distinct[start:start + 64]]
        guilty = [row for row, failed in zip(rows, fails(rows)) if failed]
        if guilty:
            return _not_finite(lm, layer, guilty[0], "")
    length = min(256, len(near))
    if fails([near[:length]])[0]:
        fine, broken = 1, length
        while broken - fine > 1:
            middle = (fine + broken) // 2
            if fails([near[:middle]])[0]:
                broken = middle
            else:
                fine = middle
        return _not_finite(lm, layer, near[:broken], f" after the {broken - 2} before it")
    return _not_finite(lm, layer, near[:2], "")


def _not_finite(lm, layer: int, row: list[int], context: str) -> ValueError:
    row_1T = torch.tensor([row], device=lm.device)
    cause = first_not_finite(lm, row_1T) or f"after block {layer}, in its row of the text"
    token = f"the token {row[-1]} ({lm.tokenizer.decode([row[-1]])!r}){context}"
    return ValueError(f"{lm.name} gives NaN or infinite values for {token}, first {cause}\n"
                      f"{CHECK_WEIGHTS}; the training of the SAE is not the cause")


def outliers(x_ND: Tensor, tokens_N: Tensor, lm) -> str | None:
    """The warning that few tokens hold most of the variance, with their names, shares and the setting that helps; None
    where they do not.

    x_ND: residuals of tokens_N, on any device. An outlier is more than 10 times as far from the `centre` as the median
    token. Where all of them together hold over half of Σ‖x − centre‖², an SAE is paid more for these than for all other
    tokens, and r² and explained variance say how well it does on them, unless they are special ones, which evals leave
    out. (Ordinary tokens of SmolLM2-135M's layer 9 stay below 4 times the median norm; massive activations, 100 times
    and more, take over with 1 token in 10,000: Sun et al. 2024, https://arxiv.org/abs/2402.17762. In its layers 15 to
    25 a line break after BOS is one, 1 token in 2,000 with 75 to 96 % of the variance. 10 is also the bound that
    dictionary_learning recommends.)
    """
    some_ND = x_ND[::max(1, -(-len(x_ND) // CENTRE_FROM))]  # spread over the block: a rough centre will do
    square_N = distances(x_ND, centre(some_ND)).square()
    total, outlier_N = square_N.sum(), square_N > OUTLIER**2 * square_N.median()
    share = float(square_N[outlier_N].sum() / total)
    if not share > 0.5:
        return None
    kinds, which = tokens_N.to(x_ND.device)[outlier_N].unique(return_inverse=True)
    of_kind = torch.zeros(len(kinds), dtype=torch.float64, device=x_ND.device).index_add_(0, which, square_N[outlier_N])
    number = which.bincount()
    order = of_kind.argsort(descending=True)[:3].tolist()
    named = "; ".join(f"{lm.tokenizer.decode([int(kinds[i])])!r} (id {int(kinds[i])}): "
                      f"{_percent(float(number[i]) / len(tokens_N))} of tokens, {float(of_kind[i] / total):.1%}"
                      for i in order)
    more = f" and {len(kinds) - 3} others" if len(kinds) > 3 else ""
    first, few = int(kinds[order[0]]), _percent(float(outlier_N.double().mean()))
    advice = "leave --keep_bos out" if first == lm.bos else _bound_between(x_ND, outlier_N)
    by_whom = "r2 and explained variance measure these, r2_median, cossim and frac_alive"
    if first in lm.special_ids:
        by_whom = "training is about these, and evals measure"
    return (f"{few} of tokens, over {OUTLIER:g} times as far from the mean as the median token, hold {share:.1%} of "
            f"the variance: {named}{more}; {by_whom} the rest, which it may hardly learn: {advice}")


def centre(x_ND: Tensor, used_N: Tensor | None = None) -> Tensor:
    """Where most tokens lie, [D] in fp64: the mean of those (of the `used` ones) at most 10 times the median distance
    away, first from 0, then, as a large mean hides who is far from it, from the mean found so.

    Zeros where none is used. Nothing waits for the device.
    """
    centre_D = x_ND.new_zeros(x_ND.shape[1], dtype=torch.float64)
    for _ in range(2):
        distance_N = distances(x_ND, centre_D)
        if used_N is not None:
            distance_N = torch.where(used_N, distance_N, math.nan)
        near_N = (distance_N <= OUTLIER * distance_N.nanmedian()).double()
        sum_D = sum(near_n @ part.double() for near_n, part in zip(near_N.split(PART), x_ND.split(PART)))
        centre_D = sum_D / near_N.sum().clamp_min(1)
    return centre_D


def distances(x_ND: Tensor, from_D: Tensor | float = 0.0) -> Tensor:
    """‖x − from‖ of each token, [N] in fp64: fp32 may overflow. In parts, as a whole copy would be the run's peak."""
    return torch.cat([(part.double() - from_D).norm(dim=1) for part in x_ND.split(PART)])


def _percent(share: float) -> str:
    """Two digits at least, however small."""
    return f"{share:.2%}" if share >= 1e-3 else f"{100 * share:.2g}%"


def _bound_between(x_ND: Tensor, outlier_N: Tensor) -> str:
    """The --max_norm_ratio that parts the outliers from all other tokens, if one does: it is one of norms alone."""
    norm_N = distances(x_ND)
    ratio_N = norm_N / norm_N.median()
    below, above = float(ratio_N[~outlier_N].max()), float(ratio_N[outlier_N].min())
    bound = OUTLIER
    if not below < bound < above:
        bound = float(f"{math.sqrt(below * above):.2g}")
    if not max(below, 1.01) < bound < above:
        return "another layer may have none"
    return f"--max_norm_ratio={bound:g} leaves them out of training and evals; another layer may have none"


def difference(x_BTD: Tensor, plain_BTD: Tensor) -> float:
    """Mean over tokens of |x - plain| / |plain|. Waits for the device."""
    return float(((x_BTD.float() - plain_BTD.float()).norm(dim=-1) / plain_BTD.float().norm(dim=-1)).mean())


def assert_agreement(x_BTD: Tensor, plain_BTD: Tensor, layer: int) -> None:
    """RuntimeError if residuals after block `layer` differ from the plain pass's by more than rounding; it waits."""
    most, error = ROUNDING[plain_BTD.dtype], difference(x_BTD, plain_BTD)
    if not error <= most:
        raise RuntimeError(f"residuals after block {layer} differ from the plain pass's by {error:.2g} of their norm, "
                           f"more than {most:g}")
