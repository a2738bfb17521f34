"""The pocket tokenizer and text encoder: CLIP's own classes with a vocabulary of the pocket captions."""

from __future__ import annotations

import json
import random

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from erase_sd.pocket.captions import grid, varied

WIDTH, LENGTH = 96, 77


def build_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer with a vocabulary of its own: whole words of the pocket captions, bytes for everything else."""
    rng = random.Random(0)
    corpus = [varied(scene, rng) for scene in grid() for _ in range(8)]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), bpe.pre_tokenizer])
    special = ["<|startoftext|>", "<|endoftext|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        special_tokens=special,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    vocab = bpe.get_vocab()
    ends = sorted(token for token in vocab if len(token) == len("x</w>") and token.endswith("</w>"))
    vocab |= dict(zip(ends, sorted(vocab[token] for token in ends), strict=True))  # the trainer numbers them by chance
    for character in sorted(alphabet):
        vocab.setdefault(f"{character}</w>", len(vocab))
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=LENGTH)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Two layers, 96 wide, 77 tokens."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            projection_dim=WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
