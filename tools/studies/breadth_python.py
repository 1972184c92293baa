"""Models of breadth.py that a user's own Python file returns: of torchvision, and hand-written modules.

A run imports this file by its path, as it would import a user's. The functions that a recipe names take no
arguments and return a model in eval mode.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from breadth_build import BLOCKS, HEADS, NEURONS, VOCABULARY, WIDTH, Case, enliven, python_case
from torch import nn
from torch.nn import functional as F

CLASSIFY, SEGMENT, TEXT = "image-classification", "image-segmentation", "text-classification"


class Attention(nn.Module):
    """Self-attention with one projection for queries, keys and values."""

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.causal = causal

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, tokens, _ = x.shape
        query, key, value = self.qkv(x).view(rows, tokens, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).flatten(2))


class SeparateAttention(nn.Module):
    """Self-attention with three projections and a written-out softmax, its head width as an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.head_width = WIDTH // HEADS
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = (
            project(x).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        weights = (query @ key.mT / self.head_width**0.5).softmax(-1)
        return self.to_out((weights @ value).transpose(1, 2).flatten(2))


class Torch(nn.MultiheadAttention):
    """torch's own attention, called with one tensor."""

    def __init__(self) -> None:
        super().__init__(WIDTH, HEADS, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x, x, x, need_weights=False)[0]


class GatedNeurons(nn.Module):
    """A feed-forward part with a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(WIDTH, NEURONS, bias=False) for _ in range(2))
        self.down = nn.Linear(NEURONS, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, attention: Callable[[], nn.Module] = Attention, gated: bool = False) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(WIDTH), attention(), nn.LayerNorm(WIDTH)
        plain = nn.Sequential(nn.Linear(WIDTH, NEURONS), nn.GELU(), nn.Linear(NEURONS, WIDTH))
        self.feed_forward = GatedNeurons() if gated else plain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.feed_forward(self.norm2(x))


class OwnViT(nn.Module):
    def __init__(self, blocks: nn.Module) -> None:
        super().__init__()
        self.patches, self.blocks = nn.Conv2d(3, WIDTH, 8, 8), blocks
        self.position = nn.Parameter(torch.randn(1, 16, WIDTH))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.patches(x).flatten(2).mT + self.position
        return self.head(self.norm(self.blocks(tokens)).mean(1))


class Repeated(nn.Module):
    """One block that runs several times."""

    def __init__(self, times: int = BLOCKS) -> None:
        super().__init__()
        self.block, self.times = Block(), times

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.times):
            x = self.block(x)
        return x


class OwnEncoder(nn.Module):
    """torch's TransformerEncoder over word and position embeddings, classified by the first token."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(128, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, NEURONS, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, BLOCKS, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        x = self.words(input_ids) + self.positions(torch.arange(input_ids.shape[1], device=input_ids.device))
        padding = None if attention_mask is None else attention_mask == 0
        return self.head(self.encoder(x, src_key_padding_mask=padding)[:, 0])


class OwnSeq2Seq(nn.Module):
    """torch's whole Transformer: the decoder reads one learned query."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.query = nn.Embedding(VOCABULARY, WIDTH), nn.Parameter(torch.randn(1, 1, WIDTH))
        self.transformer = nn.Transformer(WIDTH, HEADS, 2, 2, NEURONS, batch_first=True)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        padding, query = attention_mask == 0, self.query.expand(len(input_ids), -1, -1)
        x = self.transformer(
            self.words(input_ids), query, src_key_padding_mask=padding, memory_key_padding_mask=padding
        )
        return self.head(x[:, 0])


class OwnLSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.lstm = nn.Embedding(VOCABULARY, WIDTH), nn.LSTM(WIDTH, WIDTH, 2, batch_first=True)
        self.head = nn.Sequential(nn.Linear(WIDTH, NEURONS), nn.ReLU(), nn.Linear(NEURONS, 3))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        states, mask = self.lstm(self.words(input_ids))[0], attention_mask[..., None]
        return self.head((states * mask).sum(1) / mask.sum(1))


class TextCNN(nn.Module):
    """Convolutions over words, as for short texts."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.Sequential(
            nn.Conv1d(WIDTH, NEURONS, 3, padding=1),
            nn.ReLU(),
            nn.Conv1d(NEURONS, NEURONS, 3, padding=1),
            nn.ReLU(),
        )
        self.head = nn.Linear(NEURONS, 3)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        mask = attention_mask[..., None]
        return self.head((self.layers((self.words(input_ids) * mask).mT).mT * mask).amax(1))


class WrapsBert(nn.Module):
    """An encoder of transformers under the user's own head."""

    def __init__(self) -> None:
        super().__init__()
        import transformers

        sizes = {"hidden_size": WIDTH, "num_hidden_layers": BLOCKS, "num_attention_heads": HEADS}
        config = transformers.BertConfig(vocab_size=VOCABULARY, intermediate_size=NEURONS, **sizes)
        self.encoder, self.head = transformers.BertModel(config), nn.Linear(WIDTH, 3)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state[:, 0])


class WrapsTimm(nn.Module):
    """A backbone of timm under the user's own head."""

    def __init__(self, name: str, width: int, **arguments: Any) -> None:
        super().__init__()
        import timm

        self.backbone, self.head = timm.create_model(name, num_classes=0, **arguments), nn.Linear(width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(x))


class Siamese(nn.Module):
    """The upper and the lower half of an image through the same encoder; their difference is classified."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(*_layers(3, 32, 1), *_layers(32, 64, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Sequential(nn.Linear(64, NEURONS), nn.ReLU(), nn.Linear(NEURONS, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        upper, lower = x.chunk(2, dim=2)
        return self.head((self.encoder(upper) - self.encoder(lower)).abs())


class UNet(nn.Module):
    def __init__(self, residual: bool = False) -> None:
        super().__init__()
        self.down = nn.ModuleList(_twice(*pair) for pair in ((3, 16), (16, 32), (32, 64)))
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * out, out, 2, 2) for out in (32, 16))
        self.join = nn.ModuleList(_twice(out if residual else 2 * out, out) for out in (32, 16))
        self.head, self.residual = nn.Conv2d(16, 5, 1), residual

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = []
        for index, layer in enumerate(self.down):
            x = layer(x if index == 0 else F.max_pool2d(x, 2))
            kept.append(x)
        for up, join, skip in zip(self.up, self.join, kept[-2::-1], strict=True):
            x = join(up(x) + skip if self.residual else torch.cat([up(x), skip], 1))
        return self.head(x)


def _layers(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]


def _twice(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(*_layers(inputs, outputs, 1), *_layers(outputs, outputs, 1))


def _sequence(block: Callable[[], nn.Module]) -> OwnViT:
    return OwnViT(nn.Sequential(*(block() for _ in range(BLOCKS))))


def _cnn() -> nn.Module:
    layers = [*_layers(3, 32, 1), *_layers(32, 64, 2), *_layers(64, 64, 1), *_layers(64, 128, 2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 5))


def _mlp() -> nn.Module:
    hidden = [nn.Linear(256, 256), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 256), nn.ReLU(), *hidden, nn.Linear(256, 5))


def _torchvision(name: str, **arguments: Any) -> nn.Module:
    import torchvision

    model: nn.Module = torchvision.models.get_model(name, weights=None, **{"num_classes": 5, **arguments})
    return model


def _tv_vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(64, 16, BLOCKS, HEADS, WIDTH, NEURONS, num_classes=5)


def _tv_swin() -> nn.Module:
    from torchvision.models import SwinTransformer

    return SwinTransformer([4, 4], 32, [2, 2], [2, 4], [4, 4], num_classes=5)


#: {function: (task, attention, size, makes the model)}.
_OWN: dict[str, tuple[str, bool, int, Callable[[], nn.Module]]] = {
    "own_vit": (CLASSIFY, True, 32, partial(_sequence, Block)),
    "own_vit_separate": (CLASSIFY, True, 32, partial(_sequence, partial(Block, SeparateAttention))),
    "own_vit_gated": (CLASSIFY, True, 32, partial(_sequence, partial(Block, Attention, True))),
    "own_vit_multihead": (CLASSIFY, True, 32, partial(_sequence, partial(Block, Torch))),
    "own_vit_shared_block": (CLASSIFY, True, 32, lambda: OwnViT(Repeated())),
    "own_encoder": (TEXT, True, 0, partial(OwnEncoder, False)),
    "own_encoder_norm_first": (TEXT, True, 0, partial(OwnEncoder, True)),
    "own_seq2seq": (TEXT, True, 0, OwnSeq2Seq),
    "own_lstm": (TEXT, False, 0, OwnLSTM),
    "own_text_cnn": (TEXT, False, 0, TextCNN),
    "own_wraps_bert": (TEXT, True, 0, WrapsBert),
    "own_wraps_resnet": (CLASSIFY, False, 64, partial(WrapsTimm, "resnet18", 512)),
    "own_wraps_vit": (
        CLASSIFY,
        True,
        64,
        partial(WrapsTimm, "vit_tiny_patch16_224", WIDTH, embed_dim=WIDTH, depth=BLOCKS, num_heads=HEADS, img_size=64),
    ),
    "own_siamese": (CLASSIFY, False, 32, Siamese),
    "own_cnn": (CLASSIFY, False, 32, _cnn),
    "own_mlp": (CLASSIFY, False, 32, _mlp),
    "own_unet": (SEGMENT, False, 64, UNet),
    "own_residual_unet": (SEGMENT, False, 64, partial(UNet, True)),
}
_TORCHVISION: dict[str, tuple[str, bool, int, Callable[[], nn.Module]]] = {
    "tv_vit": (CLASSIFY, True, 64, _tv_vit),
    "tv_swin": (CLASSIFY, True, 64, _tv_swin),
    "tv_swin_v2": (CLASSIFY, True, 64, partial(_torchvision, "swin_v2_t")),
    "tv_maxvit": (CLASSIFY, True, 224, partial(_torchvision, "maxvit_t")),
    **{
        f"tv_{name}": (CLASSIFY, False, 64, partial(_torchvision, name))
        for name in (
            *("resnet18", "vgg11_bn", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "convnext_tiny"),
            *("regnet_y_400mf", "densenet121", "shufflenet_v2_x0_5", "squeezenet1_1", "alexnet", "mnasnet0_5"),
        )
    },
    "tv_googlenet": (CLASSIFY, False, 64, partial(_torchvision, "googlenet", aux_logits=False, init_weights=False)),
    "tv_inception_v3": (
        CLASSIFY,
        False,
        96,
        partial(_torchvision, "inception_v3", aux_logits=False, init_weights=False),
    ),
    **{
        f"tv_{name}": (SEGMENT, False, 64, partial(_torchvision, name, weights_backbone=None))
        for name in ("fcn_resnet50", "deeplabv3_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large")
    },
}


def _lively(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return enliven(make())


CASES: dict[str, Case] = {}
for _library, _table in (("own", _OWN), ("torchvision", _TORCHVISION)):
    for _name, (_task, _attention, _size, _make) in _table.items():
        globals()[_name] = partial(_lively, _make)
        CASES[_name.replace("_", "-")] = python_case("breadth_python.py", _name, _task, _attention, _size, _library)
