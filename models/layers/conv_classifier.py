"""The head of networks that classify every position and average: a pointwise convolution, mean over freq and time."""

from torch import Tensor, nn

from models.layers.global_mean import GlobalMean


class ConvClassifier(nn.Module):
    """Maps (batch, channel, freq, time) to logits (batch, class); its convolution, with bias, is called `conv`."""

    def __init__(self, c_in: int, n_classes: int):
        super().__init__()
        self.conv, self.pool = nn.Conv2d(c_in, n_classes, 1), GlobalMean()

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.conv(x))
