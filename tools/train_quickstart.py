#!/usr/bin/env python3
"""Train the small Vision Transformer of the quick-start recipe on scikit-learn's handwritten digits.

    python tools/train_quickstart.py                # about seven minutes on two CPU cores

Writes, below ``--out`` (default ``recipes/quickstart``):

* ``digits.npz``               uint8 images [N, 8, 8] (0..255) and int64 labels, split into train and test
* ``digits_vit.safetensors``   the fp16 state dict of the timm model described by ``MODEL_ARGS``
* ``PROVENANCE.md``            where both files come from, and the accuracy measured from them

The test images are used once, when both files are on disk: the last step of a fixed schedule is the one kept.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import time
from pathlib import Path

import numpy as np
import sklearn
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

MODEL_NAME = "vit_tiny_patch16_224"
# 32 / 4 = 8 patches a side, and the class token: 65 tokens.
MODEL_ARGS = {
    "img_size": 32,
    "patch_size": 4,
    "in_chans": 1,
    "num_classes": 10,
    "embed_dim": 128,
    "depth": 4,
    "num_heads": 8,
}
IMAGE_SIZE, MEAN, STD = 32, 0.5, 0.5
TRAIN_IMAGES, SPLIT_SEED = 1000, 0  # the split has its own seed: --seed must not move images between the two parts
BATCH, PEAK_LR, WEIGHT_DECAY, SMOOTHING, DROP_PATH, WARMUP = 50, 1e-3, 0.05, 0.1, 0.05, 0.1
MAX_CHECKPOINT_BYTES = 2_000_000


def resize(images: Tensor) -> Tensor:
    """uint8 [N, 8, 8] -> float32 [N, 1, 32, 32] in 0..1."""
    x = images.to(torch.float32).unsqueeze(1) / 255
    return F.interpolate(x, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", align_corners=False, antialias=False)


def augment(x: Tensor) -> Tensor:
    """Randomly rotate, scale, shear and shift each resized image, then add noise and erase a small square in some.

    Works on values in 0..1, before normalisation, so that the zeros grid_sample pads with are the digits' background.
    """
    n = x.shape[0]

    def uniform(limit: float) -> Tensor:
        return (torch.rand(n) * 2 - 1) * limit

    angle, shear, wide, high = uniform(math.radians(12)), uniform(0.12), 1 + uniform(0.12), 1 + uniform(0.12)
    cos, sin = angle.cos(), angle.sin()
    top_row = [cos * wide, (shear * cos - sin) * high, uniform(0.16)]  # 0.16 is 2.6 of the 32 pixels
    bottom_row = [sin * wide, (shear * sin + cos) * high, uniform(0.16)]
    theta = torch.stack(top_row + bottom_row, dim=1).view(n, 2, 3)
    x = F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False)

    # A quarter of the images lose a 6 x 6 square, so that no single stroke decides the class.
    axis = torch.arange(IMAGE_SIZE)
    top, left = torch.randint(0, IMAGE_SIZE - 5, (2, n, 1))
    rows, cols = (axis >= top) & (axis < top + 6), (axis >= left) & (axis < left + 6)
    erased = rows[:, None, :, None] & cols[:, None, None, :] & (torch.rand(n, 1, 1, 1) < 0.25)
    return (x.masked_fill(erased, 0.0) + 0.03 * torch.randn_like(x)).clamp(0, 1)


def make_split() -> dict[str, np.ndarray]:
    """The 1,797 digits as uint8 in 0..255, in a fixed split with the classes in proportion."""
    digits = load_digits()
    images, labels = np.rint(digits.images * (255 / 16)).astype(np.uint8), digits.target.astype(np.int64)
    arrays = train_test_split(images, labels, train_size=TRAIN_IMAGES, stratify=labels, random_state=SPLIT_SEED)
    return dict(zip(("train_images", "test_images", "train_labels", "test_labels"), arrays, strict=True))


def train(images: Tensor, labels: Tensor, epochs: int) -> dict[str, Tensor]:
    """Train from scratch; return the fp16 state dict at the end of the schedule."""
    # Drop path holds no weights, so the state dict also fits the model built without it.
    model = timm.create_model(MODEL_NAME, pretrained=False, drop_path_rate=DROP_PATH, **MODEL_ARGS).train()
    # timm leaves biases, norms, the class token and the position embeddings out of weight decay.
    optimizer = torch.optim.AdamW(param_groups_weight_decay(model, WEIGHT_DECAY, model.no_weight_decay()), lr=PEAK_LR)
    total = epochs * (len(labels) // BATCH)
    warmup = max(1, round(WARMUP * total))

    def factor(step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
        return (step + 1) / warmup if step < warmup else cosine

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    resized = resize(images)  # once: every augmentation starts from the same resized image
    for epoch in range(epochs):
        loss_sum = 0.0
        batches = torch.randperm(len(labels)).split(BATCH)  # BATCH divides TRAIN_IMAGES: no short batch
        for batch in batches:
            logits = model((augment(resized[batch]) - MEAN) / STD)
            loss = F.cross_entropy(logits, labels[batch], label_smoothing=SMOOTHING)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            loss_sum += loss.item()
        if (epoch + 1) % 10 == 0 or epoch + 1 == epochs:
            print(f"epoch {epoch + 1:4d}/{epochs}  training loss {loss_sum / len(batches):.4f}", flush=True)
    return {name: value.half().contiguous() for name, value in model.state_dict().items()}


@torch.inference_mode()
def count_correct(data: Path, checkpoint: Path) -> tuple[int, int]:
    """Correct answers and images of the test part, from nothing but the two files (fp16 weights run as fp32)."""
    model = timm.create_model(MODEL_NAME, pretrained=False, **MODEL_ARGS).eval()
    model.load_state_dict({name: value.float() for name, value in load_file(checkpoint).items()}, strict=True)
    with np.load(data, allow_pickle=False) as arrays:
        images, labels = torch.from_numpy(arrays["test_images"]), torch.from_numpy(arrays["test_labels"])
    predicted = model((resize(images) - MEAN) / STD).argmax(dim=1)
    return int((predicted == labels).sum()), len(labels)


PROVENANCE = """# Where these files come from

Both files are made by `python tools/train_quickstart.py --epochs {epochs} --seed {seed}`
(torch {torch}, timm {timm}, scikit-learn {sklearn}; CPU, two threads).

**`digits.npz`**: the 1,797 images of scikit-learn's `load_digits`, which is the test part of *Optical Recognition of
Handwritten Digits* (E. Alpaydin and C. Kaynak, 1998, UCI Machine Learning Repository, doi:10.24432/C50P49), licensed
CC BY 4.0. Changes: values scaled from 0..16 to 0..255 (uint8), and a fixed split stratified by class into
{n_train:,} training and {n_test} test images (over images, not writers: expect lower accuracy on new writers).

**`digits_vit.safetensors`**: fp16 weights of timm's `{model}` with
`{args}`,
trained from random initialisation on the training images alone; the last step of a fixed schedule is kept.
Input: uint8 / 255, bilinear resize to 32 x 32 (`align_corners=False`, no antialiasing), then (x - {mean}) / {std}.

**Test accuracy** (fp16 weights loaded back, run in fp32): {correct} of {n_test} = {accuracy:.2%}.

| file | bytes | SHA-256 |
|---|---|---|
{files}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the quick-start digit classifier.")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of initialisation, batches and augmentation")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "recipes" / "quickstart")
    args = parser.parse_args()
    torch.set_num_threads(2)  # fixed, because the number of threads changes the order of floating-point sums
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(args.seed)

    args.out.mkdir(parents=True, exist_ok=True)
    data, checkpoint = args.out / "digits.npz", args.out / "digits_vit.safetensors"
    split, start = make_split(), time.perf_counter()
    np.savez_compressed(data, **split)
    state = train(torch.from_numpy(split["train_images"]), torch.from_numpy(split["train_labels"]), args.epochs)
    print(f"trained in {time.perf_counter() - start:.0f} s")
    checkpoint.write_bytes(save(state))  # save_file would make a file only its owner can read
    if (size := checkpoint.stat().st_size) >= MAX_CHECKPOINT_BYTES:
        raise SystemExit(f"{checkpoint} has {size} bytes; the limit is {MAX_CHECKPOINT_BYTES}")

    correct, n_test = count_correct(data, checkpoint)
    files = [
        f"| `{p.name}` | {p.stat().st_size:,} | `{hashlib.sha256(p.read_bytes()).hexdigest()}` |"
        for p in (data, checkpoint)
    ]
    (args.out / "PROVENANCE.md").write_text(
        PROVENANCE.format(
            epochs=args.epochs,
            seed=args.seed,
            model=MODEL_NAME,
            mean=MEAN,
            std=STD,
            correct=correct,
            n_train=TRAIN_IMAGES,
            n_test=n_test,
            accuracy=correct / n_test,
            files="\n".join(files),
            args=", ".join(f"{k}={v}" for k, v in MODEL_ARGS.items()),
            torch=torch.__version__,
            timm=timm.__version__,
            sklearn=sklearn.__version__,
        )
    )
    print(f"test accuracy from the files in {args.out}: {correct}/{n_test} = {correct / n_test:.2%}")


if __name__ == "__main__":
    main()
