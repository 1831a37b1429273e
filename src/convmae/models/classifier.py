"""The encoder on the dense way with a classification head."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from convmae.models.encoder import ConvViT


class Classifier(nn.Module):
    """Mean of the encoder's last map, a LayerNorm of its own, a linear layer (the published fine-tuning form).

    Arguments as of ConvViT, and num_classes; 0 leaves out the linear layer. The position embedding is trainable.
    """

    def __init__(
        self,
        image_size: int | Sequence[int] = 224,
        in_channels: int = 3,
        num_classes: int = 1000,
        widths: Sequence[int] = (256, 384, 768),
        depths: Sequence[int] = (2, 2, 11),
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        kernel_size: int = 5,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        size = (image_size, image_size) if isinstance(image_size, int) else (image_size[0], image_size[1])
        self.settings: dict[str, Any] = {  # what a weights file records, so that `load` builds the same model
            "image_size": size,
            "in_channels": in_channels,
            "num_classes": num_classes,
            "widths": tuple(widths),
            "depths": tuple(depths),
            "num_heads": num_heads,
            "mlp_ratio": mlp_ratio,
            "kernel_size": kernel_size,
        }
        self.num_classes = num_classes
        self.num_features = widths[2]
        self.encoder = ConvViT(size, in_channels, widths, depths, num_heads, mlp_ratio, kernel_size, drop_path)
        self.encoder.pos_embed.requires_grad_(True)
        self.fc_norm = nn.LayerNorm(widths[2], eps=1e-6)
        self.head = nn.Linear(widths[2], num_classes) if num_classes else nn.Identity()
        self._initialise()

    def forward_features(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W), uint8 or normalised float -> last map (B, H / 16, W / 16, C3)."""
        return self.encoder(images)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Map (B, H, W, C3) -> logits (B, num_classes), or the pooled and normalised features (B, C3) before them."""
        pooled = self.fc_norm(features.mean(dim=(1, 2)))
        return pooled if pre_logits else self.head(pooled)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W), uint8 or normalised float -> logits (B, num_classes)."""
        return self.forward_head(self.forward_features(images))

    def _initialise(self) -> None:
        """Truncated normal 0.02 and zero bias for the linear layers, torch's own for the convolutions."""
        for part in (self.encoder.projection, self.encoder.stage3, self.head):
            for module in part.modules():
                if isinstance(module, nn.Linear):
                    nn.init.trunc_normal_(module.weight, std=0.02)
                    nn.init.zeros_(module.bias)
