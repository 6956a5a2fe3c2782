"""Tiny random models of many architectures, from transformers' configurations, with a tokenizer, as local folders."""

from __future__ import annotations

import functools
import random
from pathlib import Path

VOCABULARY, POSITIONS = 400, 256
SMALL = dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64,
             max_position_embeddings=POSITIONS, bos_token_id=0, eos_token_id=1, pad_token_id=None)
GQA = SMALL | dict(num_key_value_heads=1)
GPT = dict(vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=2, n_positions=POSITIONS, bos_token_id=0, eos_token_id=1)


def configurations() -> dict:
    """{name: a function without arguments that makes the configuration}: what each calls its sizes differs."""
    import transformers as T

    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=28,
                  patch_size=14)
    gemma = GQA | dict(head_dim=16)
    gemma3 = gemma | dict(sliding_window=8, query_pre_attn_scalar=16)
    rope = dict(rope_type="default", rope_theta=10000.0)
    return dict(
        gpt2=lambda: T.GPT2Config(**GPT),
        gptj=lambda: T.GPTJConfig(**GPT, rotary_dim=8),
        gpt_neox=lambda: T.GPTNeoXConfig(**SMALL),
        gpt_neo=lambda: T.GPTNeoConfig(vocab_size=VOCABULARY, hidden_size=32, num_layers=3, num_heads=2,
                                       intermediate_size=64, attention_types=[[["global", "local", "global"], 1]],
                                       window_size=8, max_position_embeddings=POSITIONS, bos_token_id=0,
                                       eos_token_id=1),
        opt=lambda: T.OPTConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=3, num_attention_heads=2,
                                ffn_dim=64, max_position_embeddings=POSITIONS, word_embed_proj_dim=16, bos_token_id=0,
                                eos_token_id=1, pad_token_id=1),
        bloom=lambda: T.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=3, n_head=2, bos_token_id=0,
                                    eos_token_id=1),
        falcon=lambda: T.FalconConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=3, num_attention_heads=2,
                                      bos_token_id=0, eos_token_id=1),
        mamba=lambda: T.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=3, bos_token_id=0,
                                    eos_token_id=1, pad_token_id=1),
        mpt=lambda: T.MptConfig(vocab_size=VOCABULARY, d_model=32, n_layers=3, n_heads=2, max_seq_len=POSITIONS),
        llama=lambda: T.LlamaConfig(**GQA),
        mistral=lambda: T.MistralConfig(**GQA, sliding_window=8),
        mixtral=lambda: T.MixtralConfig(**GQA, num_local_experts=3),
        qwen2=lambda: T.Qwen2Config(**GQA),
        qwen3=lambda: T.Qwen3Config(**GQA, head_dim=16),
        phi=lambda: T.PhiConfig(**SMALL),
        phi3=lambda: T.Phi3Config(**GQA),
        gemma=lambda: T.GemmaConfig(**gemma),
        gemma2=lambda: T.Gemma2Config(**gemma, sliding_window=8, query_pre_attn_scalar=16, attn_logit_softcapping=1.0,
                                      final_logit_softcapping=5.0),
        gemma3=lambda: T.Gemma3TextConfig(**gemma3),
        gemma3_wrapped=lambda: T.Gemma3Config(text_config=gemma3 | dict(model_type="gemma3_text"),
                                              vision_config=vision, mm_tokens_per_image=4, boi_token_index=5,
                                              eoi_token_index=6, image_token_index=7),
        olmo2=lambda: T.Olmo2Config(**GQA),
        stablelm=lambda: T.StableLmConfig(**GQA),
        glm4=lambda: T.Glm4Config(**GQA, head_dim=16),
        granite=lambda: T.GraniteConfig(**GQA, logits_scaling=8.0, embedding_multiplier=3.0, residual_multiplier=0.5),
        cohere=lambda: T.CohereConfig(**GQA, logit_scale=0.0625),
        cohere2=lambda: T.Cohere2Config(**GQA, logit_scale=0.0625, sliding_window=8),
        deepseek_v2=lambda: T.DeepseekV2Config(**GQA | dict(num_key_value_heads=2), kv_lora_rank=8, q_lora_rank=8,
                                               qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16,
                                               n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1,
                                               moe_intermediate_size=16, first_k_dense_replace=1, n_group=1,
                                               topk_group=1, rope_parameters=rope),
        gpt_oss=lambda: T.GptOssConfig(**GQA, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=8,
                                       rope_parameters=rope),
    )


def texts(n: int = 600, words: int = 60, seed: int = 0) -> list[str]:
    """Documents of made-up words."""
    rng = random.Random(seed)
    known = ["".join(rng.choice("abcdefghijklmnoprstuvw") for _ in range(rng.randint(2, 7))) for _ in range(300)]
    return [" ".join(rng.choice(known) for _ in range(words)) for _ in range(n)]


@functools.cache
def tokenizer():
    """Byte-level BPE with <s> 0 and </s> 1."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<s>", "</s>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(texts(80), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


def save(name: str, folder: Path) -> Path:
    """The random model of that architecture and the tokenizer, in `folder`; weights so large that each part matters."""
    import torch
    import transformers as T

    config = configurations()[name]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name == "gemma3_wrapped":
            model = T.Gemma3ForConditionalGeneration(config)
        else:
            model = T.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, parameter.shape[-1] ** -0.5)
                else:
                    parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
