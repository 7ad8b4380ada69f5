"""A checkpoint of any model with random weights that detect something, for models without trained weights.

    python tools/random_checkpoint.py meta-t-mask-rcnn out.pth [--seed 0]

In a freshly initialized deep network, activations fade, the injectors are off and nothing is detected, so a
wrong export would look right. Here, one forward pass over noise with the spectrum of photos scales each layer
right after it ran, so that its channels have mean 0 and a spread of order one (data-dependent initialization:
Mishkin & Matas, ICLR 2016). The background's bias is set so that some proposals become objects.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from meta_deploy.errors import InputError
from meta_deploy.models.checkpoint.save import save_checkpoint
from meta_deploy.models.registry import MODEL_NAMES, ModelConfig, build_model, get_config

PICTURES = 4
# The spread of a layer's output over positions and pictures, by the end of the layer's name; else 1.
SPREADS = {
    "attn.proj": 0.3,  # these three are added to what goes on
    "mlp.fc2": 0.3,
    "extractor.expand": 0.3,
    "rpn_cls": 2.0,
    "rpn_reg": 0.2,
    "fc_cls": 4.0,
    "conv_logits": 3.0,
    "conv_seg": 3.0,
    "sampling_offsets": 2.0,  # pixels
    "atss_cls": 1.5,
    "gfl_cls": 1.5,
}
# The mean of a layer's output, likewise; else 0. Of these few logits are above the threshold.
MEANS = {"atss_cls": -6.0, "gfl_cls": -6.0}
OBJECTS = 0.03  # the share of proposals that some class's score is above the threshold for

Settle = Callable[..., Tensor]


def lively_model(config: ModelConfig, pictures: Tensor, seed: int = 0) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model with random weights in which every part has an effect; deterministic.

    Args:
        config: the model's configuration.
        pictures: (B, 3, H, W), normalized; activations are of order one on these and similar images.
        seed: for the weights.

    Returns:
        The model in evaluation mode, and its outputs for the pictures.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = build_model(config)
        for name, module in model.named_modules():
            spread = next((spread for end, spread in SPREADS.items() if name.endswith(end)), 1.0)
            mean = next((mean for end, mean in MEANS.items() if name.endswith(end)), 0.0)
            if name.endswith("fc_cls"):
                threshold = getattr(config, "score_threshold", 0.0)
                heads = sum(other.endswith("fc_cls") for other, _ in model.named_modules())
                _once_run(module, partial(_set_classifier, spread, heads, len(pictures), threshold))
            elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
                _once_run(module, partial(_standardize, spread, mean))
            elif isinstance(module, nn.BatchNorm2d):
                _once_run(module, _set_statistics)
            if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)):
                module.weight.normal_(1.0, 0.1)
                module.bias.normal_(0.0, 0.1)
        for name, parameter in model.named_parameters():
            if name.endswith(("gamma", "pos_embed", "level_embed", "bias_table")):
                parameter.normal_(0.0, 0.3)
            elif name.endswith(("gamma1", "gamma2", "scale")):
                parameter.normal_(1.0, 0.1)
        return model, model(pictures)


def _once_run(module: nn.Module, settle: Settle) -> None:
    """After a module's first run, let `settle(module, input, output)` set it and return its new output."""

    def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        handle.remove()  # once only: the RPN's layers run on every level
        return settle(module, inputs[0], output)

    handle = module.register_forward_hook(hook)


def _statistics(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Each channel's mean, and one spread for all channels, so that quiet channels stay quiet."""
    channels = x.movedim(axis, 0).flatten(1)
    return channels.mean(dim=1), channels.var(dim=1).mean().sqrt()


def _standardize(spread: float, mean: float, layer: nn.Module, x: Tensor, output: Tensor) -> Tensor:
    """Scale a layer's weights and shift its bias."""
    if not layer.weight.any():  # deformable attention begins by looking at the same points everywhere
        layer.weight.normal_()
        output = layer.forward(x)
    axis = output.dim() - 1 if isinstance(layer, nn.Linear) else 1
    actual_mean, actual = _statistics(output, axis)
    scale = spread / actual
    layer.weight.mul_(scale)
    shift = mean - actual_mean * scale + torch.randn_like(actual_mean) * 0.1 * spread
    if layer.bias is None:  # a batch norm follows, which does not mind
        return output * scale
    layer.bias.mul_(scale).add_(shift)
    return output * scale + shift.reshape([-1 if i == axis else 1 for i in range(output.dim())])


def _set_statistics(norm: nn.BatchNorm2d, x: Tensor, output: Tensor) -> Tensor:
    """The same for a batch norm, by its running statistics."""
    mean, spread = _statistics(x, 1)
    norm.running_mean.copy_(mean)
    norm.running_var.uniform_(0.8, 1.25).mul_(spread**2)
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)


def _set_classifier(
    spread: float, heads: int, pictures: int, threshold: float, layer: nn.Linear, x: Tensor, output: Tensor
) -> Tensor:
    """The same for class logits (background last), so that a fraction `OBJECTS` is above the threshold.

    The layer ignores what differs between the pictures, or one of them would get all the objects.
    """
    means = x.reshape(pictures, -1, x.shape[1]).mean(dim=1)
    directions = torch.linalg.svd(means - means.mean(dim=0), full_matrices=False).Vh[:-1]
    layer.weight.sub_(layer.weight @ directions.T @ directions)
    narrowing = math.sqrt(heads)  # of the mean of the logits of a cascade's heads
    logits = _standardize(spread * narrowing, 0.0, layer, x, layer.forward(x))
    # Where this is added to the background's logit, an object's score is at the threshold.
    lead = (logits[:, :-1].amax(dim=1) - logits[:, -1]) / narrowing
    limit = lead - math.log(threshold / (1 - threshold))
    bias = limit.quantile(1 - OBJECTS)
    layer.bias[-1] += bias
    logits[:, -1] += bias
    return logits


def noise(size: tuple[int, int], count: int = PICTURES, seed: int = 0) -> Tensor:
    """Normalized images (count, 3, H, W) with the spectrum of photos: mostly grey, from dark to bright."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(count, *shape, generator=generator)

    frequency = torch.hypot(torch.fft.fftfreq(size[0])[:, None], torch.fft.rfftfreq(size[1])[None])
    frequency[0, 0] = 1.0
    x = torch.fft.irfft2(torch.fft.rfft2(normal(3, *size)) / frequency, s=size)
    x = x + 2 * x.mean(dim=1, keepdim=True)
    brightness = torch.linspace(-1.2, 1.2, count).reshape(count, 1, 1, 1)
    return x / x.std() + brightness + 0.2 * normal(3, 1, 1)


def describe(outputs: dict[str, Tensor]) -> str:
    """The model's outputs for the pictures that it was scaled on, in one line."""
    if "logits" in outputs:
        pixels = torch.bincount(outputs["logits"].argmax(dim=1).flatten()).double()
        return f"{(pixels > 0).sum()} classes, the commonest {pixels.max() / pixels.sum():.0%} of the pixels"
    scores = outputs["scores"][outputs["scores"] > 0]
    low, middle, high = scores.quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
    return (
        f"detections {', '.join(map(str, outputs['num_detections'].tolist()))}, "
        f"a tenth of them below {low:.2f}, half below {middle:.2f}, a tenth above {high:.2f}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help=f"{', '.join(MODEL_NAMES)}, or timm:NAME-HEAD")
    parser.add_argument("out", type=Path, help=".pth or .safetensors")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    began = time.perf_counter()
    try:
        config = get_config(args.model)
    except InputError as error:
        parser.error(str(error))
    model, outputs = lively_model(config, noise(config.input_size), args.seed)
    save_checkpoint(args.out, model, config)
    size = args.out.stat().st_size / 1e6
    print(f"{args.out}: {size:.0f} MB in {time.perf_counter() - began:.0f} s; {describe(outputs)}")


if __name__ == "__main__":
    main()
