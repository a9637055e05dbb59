"""Architectures of timm, torchvision and transformers with random weights, and inputs: small images, few layers.

`python tests/ecosystem_models.py` prints the list for docs/models.md.
"""

from __future__ import annotations

import importlib
import logging
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torchvision_operators
from torch import Tensor, nn

import smoothk


def import_library(name: str) -> Any:
    """timm, torchvision or transformers; ModuleNotFoundError where it is not installed."""
    if "torchvision" not in sys.modules and torchvision_operators.missing():
        torchvision_operators.declare()
    if name == "transformers":
        logging.getLogger("transformers").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries, about themselves
        return importlib.import_module(name)


@dataclass(frozen=True)
class Architecture:
    """How to make a model and one input batch (a tensor, or the dict of its arguments)."""

    library: str
    name: str
    image: int = 64
    options: dict[str, Any] = field(default_factory=dict)
    inputs: Callable[[], Any] | None = None
    quick: bool = False  # in the default tests too, where the library is there
    double: bool = False  # compared in float64

    def build(self) -> nn.Module:
        library = import_library(self.library)
        if self.library == "timm":
            return library.create_model(self.name, pretrained=False, num_classes=10, **self.options)
        if self.library == "torchvision":
            kind = library.models
            for part in self.name.split("."):
                kind = getattr(kind, part)
            return kind(weights=None, **self.options)
        config = library.AutoConfig.for_model(**self.options)
        return getattr(library, self.name)(config)

    def lively(self) -> nn.Module:
        """The model in evaluation mode, every branch of it seen in the output.

        As they come, residual branches start with a gain of 0 or 1e-6, and signals fade without statistics.
        """
        model = self.build()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if not name.endswith("bias") and parameter.numel() and parameter.abs().max() <= 1e-2:
                    parameter.uniform_(0.1, 0.3)  # more would have some amplify rounding
        return smoothk.recalibrate_batch_norm(model, [self.example() for _ in range(4)]).eval()

    def example(self) -> Any:
        return torch.randn(2, 3, self.image, self.image) if self.inputs is None else self.inputs()


def _tokens() -> dict[str, Any]:
    return {"input_ids": torch.randint(3, 100, (2, 12))}


def _decoder() -> dict[str, Any]:
    return {**_tokens(), "use_cache": False}


def _both() -> dict[str, Any]:
    return {**_tokens(), "decoder_input_ids": torch.randint(3, 100, (2, 7)), "use_cache": False}


def _speech() -> dict[str, Any]:
    return {"input_values": torch.randn(1, 4000)}


def _spectrum() -> dict[str, Any]:
    return {"input_features": torch.randn(1, 80, 100), "decoder_input_ids": torch.randint(3, 100, (1, 7))}


def _pixels() -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 3, 64, 64)}


def _pair() -> dict[str, Any]:
    return {**_tokens(), **_pixels()}


def _video() -> Tensor:
    return torch.randn(1, 3, 8, 32, 32)


_BERT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
_SMALL = {"vocab_size": 100, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_VISION = {**_BERT, "image_size": 64, "patch_size": 16}
_SPEECH = {"conv_dim": (32,) * 7, "num_conv_pos_embedding_groups": 4}
_ENCODER_DECODER = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "decoder_start_token_id": 1,
}
_T5 = {"d_model": 64, "num_layers": 2, "num_heads": 4, "d_ff": 128, "d_kv": 16, "decoder_start_token_id": 1}

_AT_64 = {"img_size": 64}
_NARROW = {"channels": (16, 32, 64, 128)}
_SWIN = {**_AT_64, "embed_dim": 32, "depths": (2, 2), "num_heads": (2, 4)}

# name: image size, options. The smallest of each family; where that is large, with fewer channels and blocks.
_TIMM: dict[str, tuple[int, dict[str, Any]]] = {
    "resnet18": (64, _NARROW),
    "resnet26d": (64, _NARROW),
    "seresnet18": (64, _NARROW),
    "skresnet18": (64, _NARROW),
    "regnetx_002": (64, {}),
    "regnety_002": (64, {}),
    "densenet121": (64, {}),
    "dla46_c": (64, {}),
    "repvgg_a0": (64, {}),
    "hrnet_w18_small": (64, {}),
    "efficientnet_b0": (64, {}),
    "tf_efficientnet_lite0": (64, {}),
    "tf_efficientnetv2_b0": (64, {}),
    "mobilenetv2_050": (64, {}),
    "mobilenetv3_small_050": (64, {}),
    "mobilenetv4_conv_small_035": (64, {}),
    "mnasnet_small": (64, {}),
    "ghostnet_050": (64, {}),
    "starnet_s1": (64, {}),
    "convnext_atto": (64, {}),
    "convnextv2_atto": (64, {}),
    "inception_next_atto": (64, {}),
    "mambaout_femto": (64, {}),
    "poolformer_s12": (64, {}),
    "fastvit_t8": (64, {}),
    "edgenext_xx_small": (64, {}),
    "mobilevit_xxs": (64, {}),
    "mobilevitv2_050": (64, {}),
    "pvt_v2_b0": (64, {}),
    "vit_tiny_patch16_224": (64, _AT_64),
    "deit_tiny_distilled_patch16_224": (64, _AT_64),
    "beit_base_patch16_224": (64, {**_AT_64, "embed_dim": 96, "depth": 2, "num_heads": 3}),
    "eva02_tiny_patch14_224": (56, {"img_size": 56}),
    "cait_xxs24_224": (64, _AT_64),
    "xcit_nano_12_p16_224": (64, _AT_64),
    "swin_tiny_patch4_window7_224": (64, _SWIN),
    "swinv2_tiny_window8_256": (64, _SWIN),
    "coat_lite_tiny": (64, _AT_64),
    "crossvit_tiny_240": (240, {}),
    "pit_ti_224": (64, _AT_64),
    "levit_128s": (224, {}),
    "visformer_tiny": (64, _AT_64),
    "gmlp_ti16_224": (64, _AT_64),
    "resmlp_12_224": (64, _AT_64),
    "maxvit_rmlp_pico_rw_256": (64, _AT_64),
    "lambda_resnet26t": (64, {}),
    "test_vit": (160, {}),
    "test_nfnet": (64, {}),
}

_TORCHVISION: dict[str, tuple[int, dict[str, Any]]] = {
    "squeezenet1_1": (64, {}),
    "shufflenet_v2_x0_5": (64, {}),
    "mobilenet_v2": (64, {}),
    "mobilenet_v3_small": (64, {}),
    "mnasnet0_5": (64, {}),
    "efficientnet_b0": (64, {}),
    "densenet121": (64, {}),
    "regnet_y_400mf": (64, {}),
    "resnet18": (64, {}),
    "googlenet": (64, {"aux_logits": False, "init_weights": False}),
    "segmentation.lraspp_mobilenet_v3_large": (64, {"weights_backbone": None}),
}

_TRANSFORMERS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "BertForSequenceClassification": (_tokens, {"model_type": "bert", **_BERT, **_SMALL}),
    "DistilBertForMaskedLM": (
        _tokens,
        {"model_type": "distilbert", "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128, **_SMALL},
    ),
    "DebertaV2Model": (
        _tokens,
        {"model_type": "deberta-v2", "relative_attention": True, "pos_att_type": ["p2c", "c2p"], **_BERT, **_SMALL},
    ),
    "GPT2LMHeadModel": (_decoder, {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, **_SMALL}),
    "LlamaForCausalLM": (_decoder, {"model_type": "llama", **_BERT, **_SMALL}),
    "MambaForCausalLM": (
        _decoder,
        {"model_type": "mamba", "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8, **_SMALL},
    ),
    "T5ForConditionalGeneration": (_both, {"model_type": "t5", **_T5, **_SMALL}),
    "BartModel": (_decoder, {"model_type": "bart", **_ENCODER_DECODER, **_SMALL}),
    "WhisperModel": (
        _spectrum,
        {"model_type": "whisper", "max_source_positions": 50, **_ENCODER_DECODER, **_SMALL},
    ),
    "Wav2Vec2Model": (_speech, {"model_type": "wav2vec2", **_SPEECH, **_BERT}),
    "ViTForImageClassification": (_pixels, {"model_type": "vit", **_VISION}),
    "CLIPModel": (
        _pair,
        {"model_type": "clip", "text_config": {**_BERT, **_SMALL}, "vision_config": _VISION, "projection_dim": 32},
    ),
    "SegformerForSemanticSegmentation": (
        _pixels,
        {"model_type": "segformer", "hidden_sizes": [16, 32, 48, 64], "depths": [1] * 4, "decoder_hidden_size": 32},
    ),
}

_QUICK = {"test_vit", "squeezenet1_1", "GPT2LMHeadModel"}
_DOUBLE = {"dla46_c"}  # with random weights its own outputs in float32 are off by 8e-5


def _all() -> dict[str, Architecture]:
    found = [
        Architecture("timm", n, size, options, quick=n in _QUICK, double=n in _DOUBLE)
        for n, (size, options) in _TIMM.items()
    ]
    found += [
        Architecture("torchvision", n, size, {"num_classes": 10, **options}, quick=n in _QUICK)
        for n, (size, options) in _TORCHVISION.items()
    ]
    found += [Architecture("torchvision", "video.r3d_18", options={"num_classes": 10}, inputs=_video)]
    found += [
        Architecture("transformers", n, options=options, inputs=inputs, quick=n in _QUICK)
        for n, (inputs, options) in _TRANSFORMERS.items()
    ]
    return {f"{one.library}/{one.name}": one for one in found}


ARCHITECTURES = _all()


def as_markdown() -> str:
    """The list, one paragraph per library."""
    paragraphs = []
    for library in ("timm", "torchvision", "transformers"):
        names = [one.name for one in ARCHITECTURES.values() if one.library == library]
        paragraphs.append(f"**{library}** ({len(names)}): " + ", ".join(f"`{name}`" for name in names) + ".")
    return "\n\n".join(paragraphs)


if __name__ == "__main__":
    print(as_markdown())
