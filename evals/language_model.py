"""The language model as training and evals see it: residuals from a cut pass, the rest of the pass from a given residual, logits.

Shapes: B rows, T context length, D = d_model, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor


class StopForward(Exception):
    """Raised by the hook on the last block needed: what comes after it is not computed."""


class LanguageModel:
    """A causal language model with its tokenizer.

    Training collects residuals from the plain transformers model, cut after the last block needed (4-11 % faster than
    through hooks on every component). Evals go through TransformerLens' TransformerBridge, which wraps the same weights in place
    and is made at their first use; a run never goes back from the second to the first, so its numbers do not depend on caches.
    """

    def __init__(self, hf, tokenizer, name: str, digest: str):
        self.hf, self.tokenizer, self.name, self.digest = hf.eval().requires_grad_(False), tokenizer, name, digest
        self.device, self.dtype = hf.device, hf.dtype
        config = hf.config.get_text_config()
        self.d_model, self.n_layers, self.vocab_size = config.hidden_size, config.num_hidden_layers, config.vocab_size
        self.logit_cap = getattr(config, "final_logit_softcapping", None)
        self.bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if self.bos is None:
            raise ValueError(f"the tokenizer of {name} has neither a BOS nor an EOS token\ngive tokenizer_config.json a bos_token")
        self.special_ids = {i for i in (self.bos, tokenizer.eos_token_id, tokenizer.pad_token_id) if i is not None}

    def to(self, device: str) -> None:
        """Move the weights, in place: a model waits in host memory while another one has the GPU."""
        self.hf.to(device)
        self.device = self.hf.device

    @property
    def backbone(self):
        """The transformer without its unembedding; after wrapping, its blocks are TransformerLens' own components."""
        return getattr(self.hf, self.hf.base_model_prefix)

    @property
    def blocks(self) -> torch.nn.ModuleList:
        """The transformer blocks, whatever the architecture calls them."""
        lists = (m for m in self.backbone.children() if isinstance(m, torch.nn.ModuleList) and len(m) == self.n_layers)
        return next(lists)

    @torch.no_grad()
    def residuals(self, tokens_BT: Tensor, layers: list[int]) -> dict[int, Tensor]:
        """Residual stream after each of the blocks `layers`: {layer: x_BTD}, from one pass of the plain model."""
        return self.residuals_and_attention(tokens_BT, layers, [])[0]

    @torch.no_grad()
    def residuals_and_attention(self, tokens_BT: Tensor, layers: list[int],
                                attention_layers: list[int]) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """{layer: x_BTD} as `residuals` and {layer: attention pattern [B, query T, key T], fp16, mean over heads}, from one pass.

        Fused attention kernels give no patterns, so a pass that is asked for some is eager: its residuals differ from theirs by rounding.
        RuntimeError for an architecture whose attention gives none.
        """
        x, patterns, T = {}, {}, tokens_BT.shape[1]
        wanted, given = len(set(layers)) + len(set(attention_layers)), self.hf.config._attn_implementation

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
            if attention_layers:
                self.hf.set_attn_implementation("eager")
            self.backbone(input_ids=tokens_BT, use_cache=False)
        except StopForward:
            pass
        finally:
            if attention_layers:
                self.hf.set_attn_implementation(given)
            for handle in handles:
                handle.remove()
        if missing := sorted(set(attention_layers) - set(patterns)):
            raise RuntimeError(f"{self.name} ({self.hf.config.model_type}) gives no attention patterns in block {missing[0]}\n"
                               "use a model with ordinary softmax attention in that block, or a variant without attention_layers")
        return x, patterns

    @cached_property
    def bridge(self):
        """The same model under TransformerLens' hook names (made once; 6 s of import)."""
        from transformer_lens.model_bridge import TransformerBridge

        self.tokenizer.init_kwargs.update(name_or_path=self.name, add_bos_token=True)  # an in-memory tokenizer lacks both
        return TransformerBridge.boot_transformers(self.name, hf_model=self.hf, tokenizer=self.tokenizer, device=self.device,
                                                   dtype=self.dtype)

    @torch.no_grad()
    def residual(self, tokens_BT: Tensor, layer: int) -> Tensor:
        """`blocks.<layer>.hook_resid_post` [B, T, D] through TransformerLens, stopping after that block."""
        kept = []
        self.bridge.run_with_hooks(tokens_BT, return_type=None, stop_at_layer=layer + 1,
                                   fwd_hooks=[(f"blocks.{layer}.hook_resid_post", lambda x, hook: kept.append(x))])
        return kept[0]

    def finish(self, x_BTD: Tensor, layer: int) -> Tensor:
        """From the residual stream after block `layer` to the input of the unembedding [B, T, D]: blocks up to it are passed by.

        Differentiable in x; the weights have no gradient.
        """
        _ = self.bridge  # wraps the blocks, so that every eval sees the same model
        passed = list(self.blocks)[:layer + 1]
        x_BTD = x_BTD.to(self.dtype)
        for block in passed:  # an instance attribute shadows the method without touching the wrapped module
            block.__dict__["forward"] = lambda hidden, *args, **kwargs: x_BTD
        try:
            blank_BT = torch.zeros(x_BTD.shape[:2], dtype=torch.long, device=x_BTD.device)
            return self.backbone(input_ids=blank_BT, use_cache=False).last_hidden_state
        finally:
            for block in passed:
                block.__dict__.pop("forward")

    def unembed(self, h: Tensor) -> Tensor:
        """Logits (..., V) of final hidden states (..., D), soft-capped where the model does so; differentiable in h."""
        logits = self.hf.get_output_embeddings()(h)
        return logits if self.logit_cap is None else torch.tanh(logits / self.logit_cap) * self.logit_cap

    @cached_property
    def uniform_when_ablated(self) -> bool:
        """Whether a zero residual stream stays zero to the end, so that all logits are equal (no biases, RMSNorm)."""
        zero = torch.zeros(1, 2, self.d_model, device=self.device, dtype=self.dtype)
        return all(not self.finish(zero, layer).any() for layer in (0, self.n_layers - 1))


def load(where: str, name: str, dtype: torch.dtype, device: str) -> LanguageModel:
    """The causal language model at `where`, a folder or a hub name, with an attention that keeps its soft-capping."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    config = AutoConfig.from_pretrained(where)
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    hf = AutoModelForCausalLM.from_pretrained(where, dtype=dtype, attn_implementation="eager" if capped else None).to(device)
    if capped:
        assert_soft_capping(hf)
    commit = getattr(config, "_commit_hash", None)
    parts = [f for f in sorted(Path(where).glob("*")) if f.suffix in (".safetensors", ".bin", ".json", ".model")]  # tokenizer included
    digest = f"{where}@{commit}" if commit else hash_files(parts)
    return LanguageModel(hf, AutoTokenizer.from_pretrained(where), name, f"{digest}:{str(dtype).removeprefix('torch.')}")


def instruct_sibling(name: str) -> str | None:
    """The instruction-tuned model that answers questions in a model's place: itself, or Gemma's on the hub; None if there is none.

    The random tiny model stands for any model.
    """
    if "instruct" in name.lower() or name.endswith("-it") or name == "tiny-gemma2":
        return name
    return f"{name}-it" if name.startswith("google/gemma") else None


@contextmanager
def standing_in(lm: LanguageModel, wanted: str, load: Callable[[str], LanguageModel]) -> Iterator[LanguageModel]:
    """`lm` if it is the model that is wanted, else that one, loaded while `lm` waits in host memory: one of them on the GPU."""
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


def shape_of(config, itemsize: int) -> dict:
    """d_model, n_layers, parameters of a block and bytes of a model with parameters of `itemsize` bytes, from its configuration alone."""
    d, mlp, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    head = getattr(config, "head_dim", None) or d // heads
    block = 2 * d * head * (heads + (getattr(config, "num_key_value_heads", None) or heads)) + 3 * d * mlp
    return dict(d_model=d, n_layers=config.num_hidden_layers, block_parameters=block,
                bytes=itemsize * (config.num_hidden_layers * block + config.vocab_size * d))


@torch.no_grad()
def assert_soft_capping(hf) -> None:
    """Gemma-2 bounds its attention logits; fused kernels have dropped that silently. A tiny cap must change the output."""
    block = getattr(hf, hf.base_model_prefix).layers[0].self_attn
    tokens = torch.arange(16, device=hf.device)[None] % hf.config.get_text_config().vocab_size
    given, outputs = block.attn_logit_softcapping, []
    for cap in (given, 1e-3):
        block.attn_logit_softcapping = cap
        outputs.append(hf(tokens, use_cache=False).logits)
    block.attn_logit_softcapping = given
    if torch.equal(*outputs):
        raise RuntimeError("this attention implementation drops Gemma-2's soft-capping of attention logits\n"
                           "use a transformers version whose eager attention keeps it")


def hash_files(files: list[Path]) -> str:
    total = hashlib.sha256()
    for file in files:
        with open(file, "rb") as stream:
            while chunk := stream.read(1 << 24):
                total.update(chunk)
    return total.hexdigest()
