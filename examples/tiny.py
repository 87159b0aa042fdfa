"""What the examples run on where no model is at hand: a random Llama, 16 wide, and a tokenizer of nine words. Take `from_pretrained` instead."""

import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = ["<pad>", "</s>", "good", "bad", "film", "the", "is", "was", "it"]
TEXTS = ["the film is good", "the film was good", "it is good", "it was good", "the film is good it is good"]


def causal() -> tuple[tf.PreTrainedModel, tf.PreTrainedTokenizerFast]:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": len(WORDS)}
    config = tf.LlamaConfig(**sizes, max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=None)
    core = Tokenizer(models.WordLevel({word: k for k, word in enumerate(WORDS)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="<pad>", unk_token="<pad>")
    return tf.LlamaForCausalLM(config), tokenizer
