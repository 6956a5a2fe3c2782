"""The language model as training and evals see it: residuals from a cut pass, the rest of it from there, logits.

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

from evals.model import architecture, attention, checks, places

# context: below it compiled eager attention moves its scores in under a twentieth of the matrix products' time
FLEX_FROM = 512
# as checks.ROUNDING, between the plain pass and TransformerLens' bridge, which does the same operations: where both
# have the same attention, tiny models of 22 architectures agree to the last bit in bf16, while a wrong bridge
# (Cohere's) may differ by no more than .006
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

    reads_text = True

    def __init__(self, hf, tokenizer, name: str, digest: str):
        self.hf, self.tokenizer, self.name, self.digest = hf.eval().requires_grad_(False), tokenizer, name, digest
        self.device, self.dtype = hf.device, hf.dtype
        config = hf.config.get_text_config()
        self.d_model, self.n_layers = config.hidden_size, config.num_hidden_layers
        self.vocab_size = len(hf.get_output_embeddings().weight)
        self.backbone, self.blocks = architecture.backbone(hf), architecture.blocks(hf)
        self.bos = architecture.bos_of(tokenizer, name)
        self.special_ids = {i for i in (self.bos, tokenizer.eos_token_id, tokenizer.pad_token_id) if i is not None}
        # compiles at its first call
        self.compiled = torch.compile(run_block, dynamic=False) if self.device.type == "cuda" else None
        self.flex_from = FLEX_FROM if getattr(config, "attn_logit_softcapping", None) else math.inf
        self.beside = {}  # (T, attention): what each block is given beside the residual stream

    @property
    def title(self) -> str:
        """What it is, for a run's log."""
        return f"language model: {self.name}, {self.n_layers} blocks"

    def to(self, device: str) -> None:
        """Move the weights, in place: a model waits in host memory while another one has the GPU."""
        self.hf.to(device)
        wrapped = self.__dict__.get("_wrapped")
        if wrapped:
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
        """({layer: x_BTD} as `residuals`, {layer: attention pattern [B, query T, key T]}), from one pass.

        Patterns are fp16, means over heads. Fused attention kernels give none, so a pass that is asked for some is
        eager: its residuals differ from theirs by rounding. RuntimeError for an architecture that gives none.
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
        missing = sorted(set(attention_layers) - set(patterns))
        if missing:
            kind = f"{self.name} ({self.hf.config.model_type})"
            raise RuntimeError(f"{kind} gives no attention patterns in block {missing[0]}\n"
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
        """{layer: x_BTD} as `residuals`; on CUDA through the compiled block, within checks.ROUNDING.

        There B < `rows` rows are filled up for the pass. What does not compile or does not agree with the plain pass
        is said in one line and done without.
        """
        while self.compiled and "_wrapped" not in self.__dict__:
            kind = attention.NAME if tokens_BT.shape[1] >= self.flex_from else None
            try:
                return self._compiled_residuals(tokens_BT, layers, rows, kind)
            except torch.cuda.OutOfMemoryError:
                raise
            except Exception as error:
                why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                if kind and attention.BLOCKS:  # this inductor, or this card, does not take them
                    attention.BLOCKS.clear()
                    self.beside.clear()
                    print(f"language model: flex attention in blocks of its own choice ({why})", flush=True)
                elif kind:
                    self.flex_from = math.inf
                    print(f"language model: no flex attention ({why}); going on with the model's own", flush=True)
                else:
                    self.compiled = None
                    print(f"language model: no compiled blocks ({why}); going on without", flush=True)
        return self.residuals(tokens_BT, layers)

    def _compiled_residuals(self, tokens_BT: Tensor, layers: list[int], rows: int,
                            kind: str | None) -> dict[int, Tensor]:
        B, T = tokens_BT.shape
        filled_RT = torch.cat([tokens_BT, tokens_BT[:1].expand(max(rows - B, 0), T)])  # each shape is compiled anew
        x, first = {}, (T, kind) not in self.beside
        if kind:
            attention.register()
        with self.attending(kind):
            given = self._given_to_blocks(T, kind) if first else self.beside[T, kind]
            h_RTD = self._entering(filled_RT)
            for layer in range(max(layers) + 1):
                args, kwargs = given[layer]
                h_RTD = self.compiled(self.blocks[layer], h_RTD, *args, **kwargs)
                if layer in layers:
                    x[layer] = h_RTD[:B]
        if first:
            for layer, plain_BTD in self.residuals(tokens_BT[:2], layers).items():
                checks.assert_agreement(x[layer][:2], plain_BTD, layer)
            self.beside[T, kind] = given
        return x

    def _given_to_blocks(self, T: int, kind: str | None) -> list[tuple[tuple, dict]]:
        """What the backbone gives each block beside the residual stream: masks and rotary angles, for any row."""
        given = []

        def note(h_BTD, *args, **kwargs):
            given.append((args, kwargs))
            return h_BTD

        with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():  # made once: not worth compiling
            warnings.simplefilter("ignore")  # flex attention advises to compile it
            if kind:
                checks.assert_soft_capping(self.hf)
            with shadowed(dict.fromkeys(self.blocks, note)):
                self.backbone(input_ids=torch.zeros(1, T, dtype=torch.long, device=self.device), use_cache=False)
        return given

    def _entering(self, tokens_BT: Tensor) -> Tensor:
        """Residual stream before the first block [B, T, D]."""

        def stop(h_BTD, *args, **kwargs):
            raise StopForward(h_BTD)

        ready = tokens_BT.new_zeros(1, 1, 1, 1)  # a mask of rank 4 is taken as it is; making one waits for the device
        try:
            with shadowed({self.blocks[0]: stop}):
                self.backbone(input_ids=tokens_BT, attention_mask=ready, use_cache=False)
        except StopForward as stopped:
            return stopped.args[0]
        raise RuntimeError(f"the backbone of {self.name} passes its first block by")

    @cached_property
    @torch.no_grad()
    def _wrapped(self) -> tuple | None:
        """(a copy of the model around the same weights, TransformerLens' bridge in it), or None if that fails."""
        tokens_BT = checks.two_rows(self)
        layers, given = list(range(self.n_layers)), dict(self.tokenizer.init_kwargs)
        plain = self._each_attention(tokens_BT, layers)  # before the bridge: it replaces functions of transformers
        try:
            if self.hf.config.get_text_config() is not self.hf.config:
                raise ValueError("a multimodal model")  # for those it may install packages (torchvision, another torch)
            from transformer_lens.model_bridge import TransformerBridge

            hf = copy.deepcopy(self.hf, {id(t): t for t in (*self.hf.parameters(), *self.hf.buffers())})
            # an in-memory tokenizer lacks both
            self.tokenizer.init_kwargs.update(name_or_path=self.name, add_bos_token=True)
            options = dict(tokenizer=self.tokenizer, device=self.device, dtype=self.dtype)
            bridge = TransformerBridge.boot_transformers(self.name, hf_model=hf, **options)
            hf.requires_grad_(False)  # where it cuts a fused matrix into parts, these are parameters of its own
            for layer, x_BTD in _through(bridge, tokens_BT, layers).items():
                error = min(checks.difference(x_BTD, x[layer]) for x in plain)
                if not error <= SAME[self.dtype]:
                    raise RuntimeError(f"residuals after block {layer} differ from the plain pass's by {error:.2g} of "
                                       "their norm")
            return hf, bridge
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001  TransformerLens supports what it supports, and says no in many ways
            self.tokenizer.init_kwargs = given
            why = " ".join(str(error).split())[:200] or type(error).__name__
            print("language model: evals go through the plain model, as training does: TransformerLens' bridge does "
                  f"not serve {self.hf.config.model_type} ({why})", flush=True)
            return None

    def _each_attention(self, tokens_BT: Tensor, layers: list[int]) -> list[dict[int, Tensor]]:
        """`residuals` with the model's own attention and with eager: with the bridge's, bf16 agrees to the last bit."""
        own = self.residuals(tokens_BT, layers)
        try:
            with self.attending("eager"):
                return [own, self.residuals(tokens_BT, layers)]
        except ValueError:  # nothing to choose
            return [own]

    @property
    def bridge(self):
        """The same weights under TransformerLens' hook names (made once, 6 s of import); None if residuals differ."""
        return self._wrapped and self._wrapped[1]

    @torch.no_grad()
    def residual(self, tokens_BT: Tensor, layer: int) -> Tensor:
        """`blocks.<layer>.hook_resid_post` [B, T, D] as evals see it, stopping after that block."""
        return self.residual_of(tokens_BT, [layer])[layer]

    @torch.no_grad()
    def residual_of(self, tokens_BT: Tensor, layers: list[int]) -> dict[int, Tensor]:
        """{layer: x_BTD} as `residual`, from one pass."""
        if self.bridge is None:
            return self.residuals(tokens_BT, layers)
        return _through(self.bridge, tokens_BT, layers)

    def finish(self, x_BTD: Tensor, layer: int) -> Tensor:
        """From the residual stream after block `layer` to the input of the unembedding [B, T, D].

        Blocks up to that one are passed by. Differentiable in x; the weights have no gradient.
        """
        return self.finish_in(self._wrapped[0] if self._wrapped else self.hf, x_BTD, layer)

    def finish_in(self, hf, x_BTD: Tensor, layer: int) -> Tensor:
        """As `finish`, through the model `hf`: the plain one, or its copy under the bridge."""
        x_BTD = x_BTD.to(self.dtype)
        given = (x_BTD, *[None] * (self._outputs - 1)) if self._outputs else x_BTD
        blank_BT = torch.zeros(x_BTD.shape[:2], dtype=torch.long, device=x_BTD.device)
        passed_by = list(architecture.blocks(hf))[:layer + 1]
        with shadowed(dict.fromkeys(passed_by, lambda hidden, *args, **kwargs: given)):
            return architecture.backbone(hf)(input_ids=blank_BT, use_cache=False).last_hidden_state

    @cached_property
    @torch.no_grad()
    def _manners(self) -> tuple[int, type, int]:
        """(members of the tuple that a block returns, 0: a tensor; class of the backbone's output; its width)."""
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
        """Width of the final hidden states: not d_model where a model projects them (some of the OPT family)."""
        return self._manners[2]

    def unembed(self, h: Tensor) -> Tensor:
        """Logits (..., V) of final hidden states (..., d_final), by the model's head, scale and cap; differentiable."""
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
    """{layer: residual stream after that block} by TransformerLens' hooks, from one pass cut after the last."""
    kept = {}

    def keep(layer):
        return lambda x_BTD, hook: kept.update({layer: x_BTD})

    bridge.run_with_hooks(tokens_BT, return_type=None, stop_at_layer=max(layers) + 1,
                          fwd_hooks=[(f"blocks.{layer}.hook_resid_post", keep(layer)) for layer in layers])
    return kept


def run_block(block: torch.nn.Module, h_BTD: Tensor, *args, **kwargs) -> Tensor:
    """The residual stream after a block: what is compiled, once for blocks of equal structure, outside every hook."""
    out = block.forward(h_BTD, *args, **kwargs)
    return out if isinstance(out, Tensor) else out[0]


@contextmanager
def shadowed(forwards: dict[torch.nn.Module, Callable]) -> Iterator[None]:
    """Within, modules compute what is given for them."""
    for module, forward in forwards.items():
        module.__dict__["forward"] = forward  # shadows the method without touching a wrapped module
    try:
        yield
    finally:
        for module in forwards:
            module.__dict__.pop("forward")


def compile_cache(folder: Path) -> Path:
    """Keep compiled kernels in `folder`, or where TORCHINDUCTOR_CACHE_DIR says; call it before anything compiles."""
    return Path(os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder)))


def load(where: str, name: str, dtype: torch.dtype, device: str) -> LanguageModel:
    """The causal language model `name` in the folder `where`, checked; its attention keeps any soft-capping."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    config, tokenizer = architecture.configuration(where, name), architecture.open_tokenizer(where, name)
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    options = dict(dtype=dtype, attn_implementation="eager" if capped else None, output_loading_info=True)
    try:  # what does not fit is told by name below
        cls = architecture.auto_class(config, name)
        hf, about = cls.from_pretrained(where, ignore_mismatched_sizes=True, **options)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # noqa: BLE001  each format of weights breaks in its own way
        raise checks.unreadable(error, name) from error
    checks.check_complete(about, config, name)
    hf = hf.to(device)
    checks.check_values(hf, tokenizer, name)
    architecture.check_vocabulary(tokenizer, len(hf.get_input_embeddings().weight), name)
    lm = LanguageModel(hf, tokenizer, name, f"{places.identity(where, name)}:{str(dtype).removeprefix('torch.')}")
    checks.check_pass(lm)
    if capped:
        checks.assert_soft_capping(hf)
    return lm


def instruct_sibling(name: str) -> str | None:
    """The instruction-tuned model that answers questions in a model's place: itself, or Gemma's on the hub, or None.

    The random tiny model stands for any model.
    """
    if "instruct" in name.lower() or name.endswith("-it") or name == places.TINY:
        return name
    return f"{name}-it" if name.startswith("google/gemma") else None


@contextmanager
def standing_in(lm: LanguageModel, wanted: str, load: Callable[[str], LanguageModel]) -> Iterator[LanguageModel]:
    """`lm` if it is the model that is wanted, else that one, loaded while `lm` leaves the GPU for host memory."""
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
