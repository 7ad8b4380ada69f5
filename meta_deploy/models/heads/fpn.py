"""Feature pyramid network (Lin et al. 2017), state-dict names as in MMDetection."""

from torch import Tensor, nn
from torch.nn import functional as F

from meta_deploy.models.init import zero_bias


class ConvModule(nn.Module):
    """A convolution, optionally with batch norm and ReLU, under MMCV's names (`conv`, `bn`)."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, norm: bool = False, relu: bool = False
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=not norm)
        self.bn = nn.BatchNorm2d(out_channels) if norm else None
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.bn is not None:
            x = self.bn(x)
        return F.relu(x) if self.relu else x


class FPN(nn.Module):
    """Four maps at strides 4..32 to five at 4..64; the fifth is every other pixel of the fourth."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.lateral_convs = nn.ModuleList(ConvModule(in_channels, out_channels, 1) for _ in range(4))
        self.fpn_convs = nn.ModuleList(ConvModule(out_channels, out_channels, 3) for _ in range(4))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                zero_bias(module)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, maps, strict=True)]
        for i in (2, 1, 0):
            laterals[i] = laterals[i] + F.interpolate(laterals[i + 1], scale_factor=2.0, mode="nearest")
        outputs = [conv(x) for conv, x in zip(self.fpn_convs, laterals, strict=True)]
        return [*outputs, F.max_pool2d(outputs[-1], 1, stride=2)]
