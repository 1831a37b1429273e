"""The encoder as a folder or a repository on the Hugging Face Hub: weights in our own format and a model card."""

import json
import re
from pathlib import Path
from typing import Any, Self

from huggingface_hub import ModelCard, PyTorchModelHubMixin, hf_hub_download
from torch import nn

from convmae import weights
from convmae.errors import UserError
from convmae.models.config import EncoderConfig
from convmae.models.fitting import fit_encoder
from convmae.models.sizes import encoder_in_file

_CARD = """---
{{ card_data }}
---

# ConvMAE encoder

Weights of a ConvViT, the hybrid encoder of
[*ConvMAE: Masked Convolution Meets Masked Autoencoders*]({{ paper_url }}): two stages of convolution blocks, then a
transformer. {{ parameters }} M parameters.

| stage | stride | channels | blocks |
|---|---|---|---|
{% for width, stride, depth in stages -%}
| {{ loop.index }} | {{ stride }} | {{ width }} | {{ depth }} |
{% endfor %}
Channels of an image: {{ settings.in_channels }}. The positions are for {{ settings.image_size[0] }} x
{{ settings.image_size[1] }} pixels and are resized for other sizes, multiples of 16.

## Use

```
pip install convmae
```

```python
from convmae import ConvViT

encoder = ConvViT.from_pretrained("USER/NAME")  # of this repository, or the path of this folder
features = encoder(images)  # (B, C, H, W), uint8 or normalised float -> (B, H / 16, W / 16, {{ settings.widths[2] }})
maps = encoder.forward_intermediates(images, intermediates_only=True)  # strides 4, 8, 16; (B, C, H, W) each
```

`model.safetensors` is a weights file of that package: its commands, such as `convmae finetune --weights`, take it too.
"""


class HubEncoder(
    PyTorchModelHubMixin,
    library_name="convmae",
    tags=["convmae", "masked-autoencoder", "image-feature-extraction"],
    license="apache-2.0",
    pipeline_tag="image-feature-extraction",
    paper_url="https://arxiv.org/abs/2205.03892",
    model_card_template=_CARD,
):
    """What the encoder inherits: `from_pretrained` here, `save_pretrained` and `push_to_hub` of huggingface_hub."""

    config: EncoderConfig
    feature_info: list[dict[str, Any]]
    description: Any
    pos_embed: nn.Parameter

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        **settings: Any,
    ) -> Self:
        """The encoder of a repository `user/name`, or of any folder or weights file that `convmae.load` takes.

        settings: arguments of ConvViT, such as drop_path or image_size; by default the file's. The encoder is in
        evaluation mode, and its table of positions learns if it is trained. Raises UserError where there are no such
        weights.
        """
        source = Path(pretrained_model_name_or_path)
        if not source.exists():
            name = str(pretrained_model_name_or_path)
            if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
                raise UserError(f"no weights at {name}: pass a folder, a weights file, or user/name on the Hub")
            try:
                source = Path(
                    hf_hub_download(
                        name,
                        weights.MODEL_FILE,
                        revision=revision,
                        cache_dir=cache_dir,
                        force_download=force_download,
                        token=token,
                        local_files_only=local_files_only,
                    )
                )
            except Exception as error:  # no such name, no such file, no permission, no network: of many types
                raise UserError(
                    f"{name} is no folder here, and its {weights.MODEL_FILE} cannot be had from the Hugging Face Hub "
                    f"({type(error).__name__}): check the name, the network and your login"
                ) from error
        state, facts = weights.read(source)
        encoder = cls(encoder=encoder_in_file(state, facts, settings.get("num_heads")), **settings)
        assert isinstance(encoder, nn.Module)
        encoder.load_state_dict(fit_encoder(state, encoder.state_dict()))
        encoder.pos_embed.requires_grad_(True)
        return encoder.eval()

    def _save_pretrained(self, save_directory: Path) -> None:
        assert isinstance(self, nn.Module)
        state = {f"encoder.{name}": value for name, value in self.state_dict().items()}
        weights.save(save_directory / weights.MODEL_FILE, state, self.description)
        (save_directory / "config.json").write_text(json.dumps(self.config.settings, indent=2) + "\n")

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """What the weights are and how to load them."""
        assert isinstance(self, nn.Module)
        facts = {
            "settings": self.config.settings,
            "stages": [
                (info["num_chs"], info["reduction"], depth)
                for info, depth in zip(self.feature_info, self.config.depths, strict=True)
            ],
            "parameters": round(sum(parameter.numel() for parameter in self.parameters()) / 1e6, 1),
        }
        return super().generate_model_card(*args, **{**facts, **kwargs})
