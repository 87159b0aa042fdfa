"""A speech model, Whisper's shape at tiny size: the closure is all that differs. python examples/speech.py

The sounds are made here, two pitches, each with a word of its own. Take `WhisperForConditionalGeneration.from_pretrained("openai/whisper-tiny")`, its
processor and recordings of your own.
"""

import torch
import transformers as tf

import zo_kernels as zk

torch.manual_seed(0)
sizes = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "num_mel_bins": 8,
}
more = {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_source_positions": 10, "max_target_positions": 8, "vocab_size": 8}
ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 2, "begin_suppress_tokens": None}
model = tf.WhisperForConditionalGeneration(tf.WhisperConfig(**sizes, **more, **ends)).eval()
step = zk.MeZOStep(model, lr=1e-2, eps=1e-2, queries=4, seed=0)


def sounds(n: int) -> dict[str, torch.Tensor]:
    high = torch.randint(0, 2, (n,))
    mels = 0.3 * torch.randn(n, 8, 20)
    mels[torch.arange(n), 1 + 5 * high] += 2
    return {"input_features": mels, "labels": torch.stack([3 + high, torch.ones_like(high)], 1)}


losses = [float(step.step(lambda batch: model(**batch).loss, [sounds(16)])) for _ in range(40)]
print(f"loss {sum(losses[:5]) / 5:.3f} -> {sum(losses[-5:]) / 5:.3f}")
