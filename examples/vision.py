"""A vision model: the closure is all that differs. python examples/vision.py

The images are made here, red or blue. Take `ViTForImageClassification.from_pretrained(...)` and images of your own.
"""

import torch
import transformers as tf

import zo_kernels as zk

torch.manual_seed(0)
sizes = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
model = tf.ViTForImageClassification(tf.ViTConfig(**sizes, num_labels=2, initializer_range=0.1)).eval()
step = zk.MeZOStep(model, lr=1e-2, eps=1e-2, queries=4, seed=0)


def images(n: int) -> dict[str, torch.Tensor]:
    labels = torch.randint(0, 2, (n,))
    pixels = 0.3 * torch.randn(n, 3, 16, 16)
    pixels[torch.arange(n), 2 * labels] += 1
    return {"pixel_values": pixels, "labels": labels}


losses = [float(step.step(lambda batch: model(**batch).loss, [images(16)])) for _ in range(40)]
print(f"loss {sum(losses[:5]) / 5:.3f} -> {sum(losses[-5:]) / 5:.3f}")
