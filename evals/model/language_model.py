"""The language model as training and evals see it: residuals from a cut pass, the rest of the pass from a given
residual, logits.

Shapes: B rows, T context length, D = d_model, V vocabulary.
"""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from evals.model import places

# context: below it compiled eager attention moves its scores in under a twentieth of the matrix products' time
FLEX_FROM = 512
# mean over tokens of |compiled - plain| / |plain| at most; on CPU SmolLM2-135M had 9e-7 in fp32 and .02 in bf16 (plain
# to fp32: .02)
ROUNDING = {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.05}

# the same between the plain pass and TransformerLens' bridge, which does the same operations: where both have the same
# attention, tiny models of 22 architectures agree to the last bit in bf16, while a wrong bridge (Cohere's) may differ
# by no more than .006 in a residual stream: real ones reach 1e5, and squares of 3e14 overflow when those of 1e6 tokens
# × 4096 are summed in fp32
LARGEST = 1e14
CHECK_WEIGHTS = "check its weights and config.json, or save the model again"
OUTLIER = 10.0  # times the median norm
LOOKED_AT = 2**16  # tokens among which outliers are looked for
ALONE = 4096  # tokens after the first that has NaN, among which its cause is looked for: more than a row
SAME = {torch.float32: 1e-4, torch.float16: 5e-4, torch.bfloat16: 2e-3}


class StopForward(Exception):
    """Raised by the hook on the last block needed: what comes after it is not computed."""


class LanguageModel:
    """A causal language model with its tokenizer.

    Training collects residuals from the plain transformers model, cut after the last block needed (4-11 % faster than
    through hooks on every component), on CUDA through a compiled block. Evals go through TransformerLens'
    TransformerBridge around a copy of its structure that shares the weights; where that cannot be made, or gives other
    residuals, through the plain model too.
    """

    def __init__(self, hf, tokenizer, name: str, digest: str):
        self.hf, self.tokenizer, self.name, self.digest = hf.eval().requires_grad_(False), tokenizer, name, digest
        self.device, self.dtype = hf.device, hf.dtype
        config = hf.config.get_text_config()
        self.d_model, self.n_layers, self.vocab_size = config.hidden_size, config.num_hidden_layers, len(hf.get_output_embeddings().weight)
        self.backbone, self.blocks = places.backbone(hf), places.blocks(hf)
        self.bos = places.bos_of(tokenizer, name)
        self.special_ids = {i for i in (self.bos, tokenizer.eos_token_id, tokenizer.pad_token_id) if i is not None}
        # compiles at its first call
        self.compiled = torch.compile(run_block, dynamic=False) if self.device.type == "cuda" else None
        self.flex_from = FLEX_FROM if getattr(config, "attn_logit_softcapping", None) else math.inf
        self.beside = {}  # (T, attention): what each block is given beside the residual stream

    def to(self, device: str) -> None:
        """Move the weights, in place: a model waits in host memory while another one has the GPU."""
        self.hf.to(device)
        if wrapped := self.__dict__.get("_wrapped"):
            wrapped[0].to(device)  # its weights have moved already: they are the same; what it made for itself has not
        self.device = self.hf.device
        self.beside.clear()

    @torch.no_grad()
    def residuals(self, tokens_BT: Tensor, layers: list[int]) -> dict[int, Tensor]:
        """Residual stream after each of the blocks `layers`: {layer: x_BTD}, from one pass of the plain model."""
        return self.residuals_and_attention(tokens_BT, layers, [])[0]

    @torch.no_grad()
    def residuals_and_attention(self, tokens_BT: Tensor, layers: list[int],
                                attention_layers: list[int]) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """{layer: x_BTD} as `residuals` and {layer: attention pattern [B, query T, key T], fp16, mean over heads}, from
        one pass.

        Fused attention kernels give no patterns, so a pass that is asked for some is eager: its residuals differ from
        theirs by rounding. RuntimeError for an architecture whose attention gives none.
        """
        x, patterns, T = {}, {}, tokens_BT.shape[1]
        wanted = len(set(layers)) + len(set(attention_layers))

        def keep(found, layer, value):
            found[layer] = value
            if len(x) + len(patterns) == wanted:
                raise StopForward

        def keep_residual(layer):
            return lambda module, args, output: keep(x, layer, output if isinstance(output, Tensor) else output[0])

        def keep_pattern(layer):
            def hook(module, args, output):
                for part in output if isinstance(output, tuple) else ():  # norms have "attention" in their name too
                    if isinstance(part, Tensor) and part.dim() == 4 and part.shape[2:] == (T, T):
                        keep(patterns, layer, part.mean(1, dtype=torch.float32).half())
            return hook

        handles = [self.blocks[layer].register_forward_hook(keep_residual(layer)) for layer in set(layers)]
        handles += [module.register_forward_hook(keep_pattern(layer)) for layer in set(attention_layers)
                    for name, module in self.blocks[layer].named_children() if "attn" in name or "attention" in name]
        try:
            with self.attending("eager" if attention_layers else None):
                self.backbone(input_ids=tokens_BT, use_cache=False)
        except StopForward:
            pass
        finally:
            for handle in handles:
                handle.remove()
        if missing := sorted(set(attention_layers) - set(patterns)):
            raise RuntimeError(f"{self.name} ({self.hf.config.model_type}) gives no attention patterns in block "
                               f"{missing[0]}\n"
                               "use a model with ordinary softmax attention in that block, or a variant without "
                               "attention_layers")
        return x, patterns

    @contextmanager
    def attending(self, kind: str | None) -> Iterator[None]:
        """Attention of that kind within; None: the model's own."""
        given = self.hf.config._attn_implementation
        if kind:
            self.hf.set_attn_implementation(kind)
        try:
            yield
        finally:
            if kind:
                self.hf.set_attn_implementation(given)

    @torch.no_grad()
    def training_residuals(self, tokens_BT: Tensor, layers: list[int], rows: int) -> dict[int, Tensor]:
        """{layer: x_BTD} as `residuals`; on CUDA through the compiled block, within ROUNDING, with B < `rows` filled up
        for the pass.

        What does not compile or does not agree with the plain pass is said in one line and done without.
        """
        while self.compiled and "_wrapped" not in self.__dict__:
            attention = "flex_attention" if tokens_BT.shape[1] >= self.flex_from else None
            try:
                return self._compiled_residuals(tokens_BT, layers, rows, attention)
            except torch.cuda.OutOfMemoryError:
                raise
            except Exception as error:
                why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                if attention:
                    self.flex_from = math.inf
                    print(f"language model: no flex attention ({why}); going on with the model's own", flush=True)
                else:
                    self.compiled = None
                    print(f"language model: no compiled blocks ({why}); going on without", flush=True)
        return self.residuals(tokens_BT, layers)

    def _compiled_residuals(self, tokens_BT: Tensor, layers: list[int], rows: int, attention: str
                            | None) -> dict[int, Tensor]:
        B, T = tokens_BT.shape
        # every shape is compiled on its own
        filled_RT = torch.cat([tokens_BT, tokens_BT[:1].expand(max(rows - B, 0), T)])
        x, first = {}, (T, attention) not in self.beside
        with self.attending(attention):
            given = self._given_to_blocks(T, attention) if first else self.beside[T, attention]
            h_RTD = self._entering(filled_RT)
            for layer in range(max(layers) + 1):
                args, kwargs = given[layer]
                h_RTD = self.compiled(self.blocks[layer], h_RTD, *args, **kwargs)
                if layer in layers:
                    x[layer] = h_RTD[:B]
        if first:
            for layer, plain_BTD in self.residuals(tokens_BT[:2], layers).items():
                assert_agreement(x[layer][:2], plain_BTD, layer)
            self.beside[T, attention] = given
        return x

    def _given_to_blocks(self, T: int, attention: str | None) -> list[tuple[tuple, dict]]:
        """What the backbone gives each block beside the residual stream:
        masks and rotary angles of one row, which hold for all rows.
        """
        given = []

        def note(h_BTD, *args, **kwargs):
            given.append((args, kwargs))
            return h_BTD

        # made once: nothing here is worth compiling
        with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # flex attention advises to compile it
            if attention:
                assert_soft_capping(self.hf)
            with shadowed(dict.fromkeys(self.blocks, note)):
                self.backbone(input_ids=torch.zeros(1, T, dtype=torch.long, device=self.device), use_cache=False)
        return given

    def _entering(self, tokens_BT: Tensor) -> Tensor:
        """Residual stream before the first block [B, T, D]."""

        def stop(h_BTD, *args, **kwargs):
            raise StopForward(h_BTD)

        # a mask of rank 4 is taken as it is; making one would wait for the device
        ready = tokens_BT.new_zeros(1, 1, 1, 1)
        try:
            with shadowed({self.blocks[0]: stop}):
                self.backbone(input_ids=tokens_BT, attention_mask=ready, use_cache=False)
        except StopForward as stopped:
            return stopped.args[0]
        raise RuntimeError(f"the backbone of {self.name} passes its first block by")

    @cached_property
    @torch.no_grad()
    def _wrapped(self) -> tuple | None:
        """(a copy of the model around the same weights, TransformerLens' bridge in it),
        or None where evals take the plain model.
        """
        generator = torch.Generator().manual_seed(0)
        tokens_BT = torch.randint(self.vocab_size, (2, 16), generator=generator).to(self.device)
        layers, given = list(range(self.n_layers)), dict(self.tokenizer.init_kwargs)
        # before the bridge is made: it replaces functions of transformers
        plain = self._each_attention(tokens_BT, layers)
        try:
            # for those it may install packages (torchvision, another torch)
            if self.hf.config.get_text_config() is not self.hf.config:
                raise ValueError("a multimodal model")
            from transformer_lens.model_bridge import TransformerBridge

            hf = copy.deepcopy(self.hf, {id(t): t for t in (*self.hf.parameters(), *self.hf.buffers())})
            # an in-memory tokenizer lacks both
            self.tokenizer.init_kwargs.update(name_or_path=self.name, add_bos_token=True)
            bridge = TransformerBridge.boot_transformers(self.name, hf_model=hf, tokenizer=self.tokenizer,
                                                         device=self.device, dtype=self.dtype)
            hf.requires_grad_(False)  # where it cuts a fused matrix into parts, these are parameters of its own
            for layer, x_BTD in _through(bridge, tokens_BT, layers).items():
                error = min(difference(x_BTD, x[layer]) for x in plain)
                if not error <= SAME[self.dtype]:
                    raise RuntimeError(f"residuals after block {layer} differ from the plain pass's by {error:.2g} of "
                                       "their norm")
            return hf, bridge
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001  TransformerLens supports what it supports, and says no in many ways
            self.tokenizer.init_kwargs = given
            print(f"language model: evals go through the plain model, as training does: TransformerLens' bridge does "
                  f"not serve {self.hf.config.model_type} "
                  f"({' '.join(str(error).split())[:200] or type(error).__name__})", flush=True)
            return None

    def _each_attention(self, tokens_BT: Tensor, layers: list[int]) -> list[dict[int, Tensor]]:
        """`residuals` with the model's own attention and with eager:
        the bridge has one of them, and then bf16 agrees to the last bit.
        """
        own = self.residuals(tokens_BT, layers)
        try:
            with self.attending("eager"):
                return [own, self.residuals(tokens_BT, layers)]
        except ValueError:  # nothing to choose
            return [own]

    @property
    def bridge(self):
        """The same weights under TransformerLens' hook names (made once;
        6 s of import), or None where it gives other residuals.
        """
        return self._wrapped and self._wrapped[1]

    @torch.no_grad()
    def residual(self, tokens_BT: Tensor, layer: int) -> Tensor:
        """`blocks.<layer>.hook_resid_post` [B, T, D] as evals see it, stopping after that block."""
        if self.bridge is None:
            return self.residuals(tokens_BT, [layer])[layer]
        return _through(self.bridge, tokens_BT, [layer])[layer]

    def finish(self, x_BTD: Tensor, layer: int) -> Tensor:
        """From the residual stream after block `layer` to the input of the unembedding [B, T, D]: blocks up to it are
        passed by.

        Differentiable in x; the weights have no gradient.
        """
        return self._finish(self._wrapped[0] if self._wrapped else self.hf, x_BTD, layer)

    def _finish(self, hf, x_BTD: Tensor, layer: int) -> Tensor:
        x_BTD = x_BTD.to(self.dtype)
        given = (x_BTD, *[None] * (self._outputs - 1)) if self._outputs else x_BTD
        blank_BT = torch.zeros(x_BTD.shape[:2], dtype=torch.long, device=x_BTD.device)
        with shadowed(dict.fromkeys(list(places.blocks(hf))[:layer + 1], lambda hidden, *args, **kwargs: given)):
            return places.backbone(hf)(input_ids=blank_BT, use_cache=False).last_hidden_state

    @cached_property
    @torch.no_grad()
    def _manners(self) -> tuple[int, type, int]:
        """(members of the tuple that a block returns, 0: a tensor; the class of the backbone's output;
        its width), from a pass.
        """
        found = []
        handle = self.blocks[0].register_forward_hook(lambda module, args, output: found.append(output))
        try:
            output = self.backbone(input_ids=torch.zeros(1, 2, dtype=torch.long, device=self.device), use_cache=False)
        finally:
            handle.remove()
        return 0 if isinstance(found[0], Tensor) else len(found[0]), type(output), output.last_hidden_state.shape[-1]

    @property
    def _outputs(self) -> int:
        return self._manners[0]

    @property
    def d_final(self) -> int:
        """Width of the final hidden states, which is not d_model where a model projects them
        (some of the OPT family).
        """
        return self._manners[2]

    def unembed(self, h: Tensor) -> Tensor:
        """Logits (..., V) of final hidden states (..., d_final), by the model's own head with its scale and cap;
        differentiable in h.
        """
        h_N1D = h.reshape(-1, 1, h.shape[-1])
        blank_N1 = torch.zeros(h_N1D.shape[:2], dtype=torch.long, device=h.device)
        output = self._manners[1](last_hidden_state=h_N1D)
        with shadowed({self.backbone: lambda *args, **kwargs: output}):
            logits_N1V = self.hf(input_ids=blank_N1, use_cache=False).logits
        return logits_N1V.reshape(*h.shape[:-1], -1)

    @cached_property
    @torch.no_grad()
    def uniform_when_ablated(self) -> bool:
        """Whether a zero residual stream stays zero to the end, so that all logits are equal (no biases, RMSNorm)."""
        zero = torch.zeros(1, 2, self.d_model, device=self.device, dtype=self.dtype)
        finished = [self.finish(zero, layer) for layer in (0, self.n_layers - 1)]
        return not any(h.any() for h in finished) and bool(self.unembed(finished[0]).std() == 0)


def _through(bridge, tokens_BT: Tensor, layers: list[int]) -> dict[int, Tensor]:
    """{layer: residual stream after that block} by TransformerLens' hooks,
    in one pass that stops after the last of them.
    """
    kept = {}

    def keep(layer):
        return lambda x_BTD, hook: kept.update({layer: x_BTD})

    bridge.run_with_hooks(tokens_BT, return_type=None, stop_at_layer=max(layers) + 1,
                          fwd_hooks=[(f"blocks.{layer}.hook_resid_post", keep(layer)) for layer in layers])
    return kept


def run_block(block: torch.nn.Module, h_BTD: Tensor, *args, **kwargs) -> Tensor:
    """The residual stream after a block: the unit that is compiled, once for all blocks of equal structure,
    outside every hook.
    """
    out = block.forward(h_BTD, *args, **kwargs)
    return out if isinstance(out, Tensor) else out[0]


@contextmanager
def shadowed(forwards: dict[torch.nn.Module, Callable]) -> Iterator[None]:
    """Within, modules compute what is given for them:
    an instance attribute shadows the method without touching a wrapped module.
    """
    for module, forward in forwards.items():
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for module in forwards:
            module.__dict__.pop("forward")


def compile_cache(folder: Path) -> Path:
    """Keep compiled kernels in `folder`, or where TORCHINDUCTOR_CACHE_DIR says already;
    call it before anything compiles.
    """
    return Path(os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder)))


def load(where: str, name: str, dtype: torch.dtype, device: str) -> LanguageModel:
    """The causal language model in the folder `where`, with an attention that keeps its soft-capping;
    `name` is what it is called.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    config, tokenizer = places.configuration(where, name), places.open_tokenizer(where, name)
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    options = dict(dtype=dtype, attn_implementation="eager" if capped else None, output_loading_info=True)
    try:  # what does not fit is told by name below
        hf, about = places.auto_class(config, name).from_pretrained(where, ignore_mismatched_sizes=True, **options)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # noqa: BLE001  each format of weights breaks in its own way
        raise places.unreadable(error, name) from error
    places.check_complete(about, config, name)
    hf = hf.to(device)
    places.check_values(hf, tokenizer, name)
    places.check_vocabulary(tokenizer, len(hf.get_input_embeddings().weight), name)
    lm = LanguageModel(hf, tokenizer, name, f"{places.identity(where, name)}:{str(dtype).removeprefix('torch.')}")
    check_pass(lm)
    if capped:
        assert_soft_capping(hf)
    return lm


@torch.no_grad()
def check_pass(lm: LanguageModel) -> None:
    """RuntimeError that names the block, and why, where two short rows give no numbers, ones too large,
    or leave a block as they came.
    """
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(lm.vocab_size, (2, 16), generator=generator).to(lm.device)
    what = f"{lm.name} ({lm.hf.config.model_type})"
    if cause := first_not_finite(lm, tokens_BT):
        raise RuntimeError(f"{what} gives NaN or infinite values {cause}\n{CHECK_WEIGHTS}")
    for number, (x_BTD, out_BTD) in enumerate(_around_blocks(lm, tokens_BT)):
        given, most = (float(h_BTD.abs().max()) for h_BTD in (x_BTD, out_BTD))
        if max(given, most) > LARGEST:
            place = (f"after block {number}, {_of_weights(lm, number)}" if most > given
                     else f"before block {number}, in its embeddings")
            raise RuntimeError(f"{what} gives values up to {max(given, most):.2g} {place}: their squares overflow\n"
                               f"{CHECK_WEIGHTS}")
        if torch.equal(x_BTD, out_BTD):
            raise RuntimeError(f"{what}: block {number} changes nothing: what it adds is 0, or is lost in rounding "
                               f"beside its input's values of up to {most:.2g}\n{CHECK_WEIGHTS}")


def first_not_finite(lm: LanguageModel, tokens_BT: Tensor) -> str | None:
    """Where in the pass of these rows NaN or infinity first comes up, and why, in words; None where all is finite."""
    dtype = str(lm.dtype).removeprefix("torch.")
    for number, (x_BTD, out_BTD) in enumerate(_around_blocks(lm, tokens_BT)):
        if not x_BTD.isfinite().all():
            return f"before block 0, in its embeddings, in {dtype}"
        if not out_BTD.isfinite().all():
            broken = next((key for key, weight in lm.blocks[number].named_parameters() if not weight.isfinite().all()),
                          None)
            why = f"its {broken} holds such" if broken else f"it overflows {_of_weights(lm, number)}"
            return f"after block {number} in {dtype}: {why}, and is given values up to {float(x_BTD.abs().max()):.2g}"
    logits_BTV = lm.hf(input_ids=tokens_BT, use_cache=False).logits
    return None if logits_BTV.isfinite().all() else f"as logits in {dtype}, though all blocks give finite ones"


def _of_weights(lm: LanguageModel, number: int) -> str:
    """The largest weight of a block, which tells one that was made too large from one that was trained so."""
    most = {key: float(weight.abs().max()) for key, weight in lm.blocks[number].named_parameters() if weight.numel()}
    key = max(most, key=most.get)
    return f"with weights up to {most[key]:.2g} ({key})"


@torch.no_grad()
def _around_blocks(lm: LanguageModel, tokens_BT: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(residual stream that goes into, that comes out of) each block, from one plain pass."""
    into, out = [], []

    def before(module, args, kwargs):
        # a block may work in place
        into.append(next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)).clone())

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
def trial(lm: LanguageModel, layers: list[int]) -> None:
    """Two short rows through all that a run will ask of the plain model, held against one whole pass of it.

    RuntimeError, with the figure, where the pass cannot be cut at one of the `layers` or put together again from there:
    then every result would be another model's.
    """
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(lm.vocab_size, (2, 16), generator=generator).to(lm.device)
    kind = f"{lm.name} ({lm.hf.config.model_type})"

    def refuse(what: str):
        raise RuntimeError(f"{kind} {what}\n{places.ONE_STREAM}")

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
            later = float((lm.residuals(other_BT,
                                        [layer])[layer] - x_BTD)[:, :-1].float().norm() / x_BTD.float().norm())
            if not later <= ROUNDING[lm.dtype]:
                refuse(f"is not causal: another last token changes what earlier ones get from block {layer} by "
                       f"{later:.2g} of their norm")
            ours_BTV = lm.unembed(lm._finish(lm.hf, x_BTD, layer))
            ablated = lm.unembed(lm._finish(lm.hf, torch.zeros_like(x_BTD), layer))
        except (AttributeError, TypeError, ValueError, IndexError, KeyError) as error:
            refuse(f"cannot be cut after block {layer}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        error = float((ours_BTV.float() - logits_BTV.float()).norm() / logits_BTV.float().norm())
        if not error <= ROUNDING[lm.dtype]:
            refuse(f"gives other logits when its pass is cut after block {layer} and finished from there: they differ "
                   f"by {error:.2g} of their norm, more than {ROUNDING[lm.dtype]:g}")
        if not ablated.isfinite().all():
            refuse(f"gives NaN or infinite logits when the residual stream after block {layer} is ablated")


def instruct_sibling(name: str) -> str | None:
    """The instruction-tuned model that answers questions in a model's place: itself, or Gemma's on the hub; None if
    there is none.

    The random tiny model stands for any model.
    """
    if "instruct" in name.lower() or name.endswith("-it") or name == "tiny-gemma2":
        return name
    return f"{name}-it" if name.startswith("google/gemma") else None


@contextmanager
def standing_in(lm: LanguageModel, wanted: str, load: Callable[[str], LanguageModel]) -> Iterator[LanguageModel]:
    """`lm` if it is the model that is wanted, else that one, loaded while `lm` waits in host memory:
    one of them on the GPU.
    """
    if wanted == lm.name:
        yield lm
        return
    device = str(lm.device)
    lm.to("cpu")
    try:
        yield load(wanted)
    finally:
        torch.cuda.empty_cache()
        lm.to(device)


@torch.no_grad()
def assert_soft_capping(hf) -> None:
    """Gemma-2 bounds its attention logits; fused kernels have dropped that silently.
    A tiny cap must change the output.
    """
    block = places.blocks(hf)[0].self_attn
    tokens = torch.arange(16, device=hf.device)[None] % hf.config.get_text_config().vocab_size
    given, outputs = block.attn_logit_softcapping, []
    for cap in (given, 1e-3):
        block.attn_logit_softcapping = cap
        outputs.append(hf(tokens, use_cache=False).logits)
    block.attn_logit_softcapping = given
    if torch.equal(*outputs):
        raise RuntimeError("this attention implementation drops Gemma-2's soft-capping of attention logits\n"
                           "use a transformers version whose eager attention keeps it")


@torch.no_grad()
def not_finite(lm: LanguageModel, layer: int, x_ND: Tensor, tokens_N: Tensor) -> ValueError:
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
        if guilty := [row for row, failed in zip(rows, fails(rows)) if failed]:
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


def _not_finite(lm: LanguageModel, layer: int, row: list[int], context: str) -> ValueError:
    cause = first_not_finite(lm,
                             torch.tensor([row], device=lm.device)) or f"after block {layer}, in its row of the text"
    token = f"the token {row[-1]} ({lm.tokenizer.decode([row[-1]])!r}){context}"
    return ValueError(f"{lm.name} gives NaN or infinite values for {token}, first {cause}\n"
                      f"{CHECK_WEIGHTS}; the training of the SAE is not the cause")


def outliers(x_ND: Tensor, tokens_N: Tensor, tokenizer) -> str | None:
    """The warning that few tokens hold most of E‖x‖², with their names and shares; None where they do not.

    x_ND: residuals of tokens_N, on any device. An outlier has more than 10 times the median norm. Where all of them
    together hold over half of E‖x‖², the unit in which training measures its error, an SAE is paid more for these than
    for all other tokens, and r² and explained variance say how well it does on them. (Ordinary tokens of SmolLM2-135M's
    layer 9 stay below 4 times the median; massive activations, 100 times and more, take over with 1 token in 10,000:
    Sun et al. 2024, https://arxiv.org/abs/2402.17762.)
    """
    x_ND, tokens_N = x_ND[:LOOKED_AT], tokens_N[:LOOKED_AT]
    square_N = torch.cat([part.double().pow(2).sum(-1) for part in x_ND.split(2**13)])  # fp32 may overflow
    total, outlier_N = square_N.sum(), square_N > OUTLIER**2 * square_N.median()
    share = float(square_N[outlier_N].sum() / total)
    if not share > 0.5:
        return None
    kinds, which = tokens_N.to(x_ND.device)[outlier_N].unique(return_inverse=True)
    of_kind = torch.zeros(len(kinds), dtype=torch.float64, device=x_ND.device).index_add_(0, which, square_N[outlier_N])
    number = which.bincount()
    order = of_kind.argsort(descending=True)[:3].tolist()
    named = "; ".join(f"{tokenizer.decode([int(kinds[i])])!r} (id {int(kinds[i])}): "
                      f"{float(number[i]) / len(tokens_N):.2%} of tokens, {float(of_kind[i] / total):.1%}"
                      for i in order)
    more = f" and {len(kinds) - 3} others" if len(kinds) > 3 else ""
    return (f"{float(outlier_N.double().mean()):.2%} of tokens, of norms over {OUTLIER:g} times the median, hold "
            f"{share:.1%} of E‖x‖²: {named}{more}; r2 and explained variance measure these, cossim and frac_alive the "
            "rest, which the SAE hardly learns: another layer may have none")


def difference(x_BTD: Tensor, plain_BTD: Tensor) -> float:
    """Mean over tokens of |x - plain| / |plain|. Waits for the device."""
    return float(((x_BTD.float() - plain_BTD.float()).norm(dim=-1) / plain_BTD.float().norm(dim=-1)).mean())


def assert_agreement(x_BTD: Tensor, plain_BTD: Tensor, layer: int) -> None:
    """RuntimeError if residuals after block `layer` differ from the plain pass's by more than rounding.
    Waits for the device.
    """
    most, error = ROUNDING[plain_BTD.dtype], difference(x_BTD, plain_BTD)
    if not error <= most:
        raise RuntimeError(f"residuals after block {layer} differ from the plain pass's by {error:.2g} of their norm, "
                           f"more than {most:g}")
